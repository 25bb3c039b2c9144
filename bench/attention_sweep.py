"""Which configuration of the attention kernels is fastest on this GPU, for one head dimension.

    python -m bench.attention_sweep --size 64 --json sweep.json     # minutes, most of it compiling

Every kernel alone, on 4 x 8,192 tokens and on 32,768 tokens of documents as long as GSM8K's, under
each of CANDIDATES. A result further than rounding from that of the table in use is marked wrong,
whatever its speed. The winners belong into CONFIGS in kernels/triton_attention.py. Exit code 1:
the table itself is wrong; 2: no GPU.
"""

import itertools
import sys
from collections.abc import Sequence

import torch

from bench import measure
from bench.attention import HEADS, LIMIT, exact, gsm8k_lengths, inputs
from bench.measure import Bench
from bench.processes import interpreted
from kernels import backend
from kernels import triton_attention as ta
from kernels.triton_attention import Config

# Queries, keys, warps, stages, and whether weighted sums are transposed.
CANDIDATES = [
    Config(*values)
    for values in itertools.chain(
        itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3), (False, True)),
        itertools.product((128,), (64, 128), (4, 8), (4,), (False,)),
    )
]
KERNELS = ("forward", "queries", "keys")


class Case:
    """The tensors of one shape; every run of a kernel writes into outputs of its own."""

    def __init__(self, lengths: Sequence[int], size: int, device: torch.device) -> None:
        self.lengths, self.tiles = lengths, ta.tile_map(lengths).to(device)
        qkv, self.do = inputs(lengths, size, device)
        self.qkv = [x.detach() for x in qkv]
        self.o, self.lse = ta.attention(*self.qkv, self.tiles)
        self.delta = torch.empty_like(self.lse)  # filled by the kernel that owns queries
        self.table = dict(zip(KERNELS, ta.configs_for(device, size), strict=True))
        self.want = {name: self.run(name, self.table[name]) for name in KERNELS}

    def run(self, name: str, config: Config) -> list[torch.Tensor]:
        """The outputs of a kernel under a configuration."""
        q, k, v = self.qkv
        by_queries = (config, self.tiles[0], q.shape[1], config.rows)
        if name == "forward":
            out = [torch.empty_like(q), torch.empty_like(self.lse)]
            ta._launch(ta.forward_kernel, *by_queries, q, k, v, *out)
        elif name == "queries":
            out = [torch.empty_like(q)]
            saved = (self.o, self.do, self.lse, self.delta)
            ta._launch(ta.queries_kernel, *by_queries, q, k, v, *saved, *out)
        else:
            out = [torch.empty_like(k), torch.empty_like(v)]
            by_keys = (config, self.tiles[1], k.shape[1], config.keys)
            saved = (self.do, self.lse, self.delta)
            ta._launch(ta.keys_kernel, *by_keys, q, k, v, *saved, *out)
        return out

    def right(self) -> bool:
        """Whether the table's own results are those of the definition."""
        got = [self.want["forward"][0], *self.want["queries"], *self.want["keys"]]
        want = exact(self.qkv, self.do, self.lengths)
        errors = [measure.relative_error(a, b) for a, b in zip(got, want, strict=True)]
        return max(errors) <= LIMIT

    def measured(self, name: str, config: Config) -> dict:
        """How far a configuration is from the table's results, and its milliseconds."""
        results = zip(self.run(name, config), self.want[name], strict=True)
        apart = max(measure.relative_error(a, b) for a, b in results)
        ms = measure.milliseconds(lambda: self.run(name, config), self.do.device, samples=7)
        return {"ms": ms, "apart": apart, "note": "WRONG" if apart > 2 * LIMIT else ""}


def sweep(bench: Bench, cases: dict[str, Case]) -> None:
    candidates = CANDIDATES[:2] if bench.dry else CANDIDATES
    for name in KERNELS:
        in_use = next(iter(cases.values())).table[name]
        for config in dict.fromkeys([in_use, *candidates]):
            for shape, case in cases.items():
                if bench.out_of_time():
                    return
                facts = (
                    {"kernel": name, "shape": shape} | vars(config) | {"table": config == in_use}
                )
                got, why = measure.attempt(lambda c=case, n=name, k=config: c.measured(n, k))
                bench.keep("rows", facts | (got or {"ms": None, "apart": None, "note": why}))


def report(rows: Sequence[dict], shapes: Sequence[str]) -> None:
    """The table's configuration and the eight fastest, by shape and kernel; what is wrong."""
    for shape in shapes:
        for name in KERNELS:
            these = [row for row in rows if row["kernel"] == name and row["shape"] == shape]
            good = [row for row in these if row["ms"] and not row["note"]]
            good.sort(key=lambda row: row["ms"])
            shown = [row for row in these if row["table"]] + good[:8]
            if shown:
                print(measure.table(shown), end="\n\n")
    bad = [row for row in rows if row["note"] == "WRONG"]
    print(measure.table(bad) if bad else "no configuration is wrong")


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--json", "sweep.json", minutes=8)
    parser.add_argument(
        "--size", type=int, choices=sorted(HEADS), default=64, help="head dimension"
    )
    args = parser.parse_args(argv)
    if args.dry:
        code = interpreted("bench.attention_sweep", sys.argv[1:] if argv is None else argv)
        if code is not None:
            return code
    bench = Bench(args.dry, args.minutes, args.path)
    backend.use("triton")
    shapes = {"4 x 8192": [8192] * 4, "GSM8K 32768": gsm8k_lengths(32768)}
    checked = [0, 1, 127, 129, 1000]
    if args.dry:
        shapes, checked = {"5 and 3": [5, 3]}, [0, 1, 7]
    bench.put("right", Case(checked, args.size, bench.device).right())
    cases = {shape: Case(lengths, args.size, bench.device) for shape, lengths in shapes.items()}
    sweep(bench, cases)
    report(bench.record.get("rows", []), list(shapes))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
