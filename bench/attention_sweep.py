"""Which configuration of the attention kernels is fastest on this GPU, one head dimension at a time (some minutes, most of it compiling):

    python -m bench.attention_sweep --size 64 --json sweep.json

Every kernel alone, on 4 × 8,192 tokens and on 32,768 tokens of documents as long as GSM8K's: tiles, warps, stages and both forms
(kernels/triton_attention.py: FLIP). A result further than rounding from that of the table in use is marked wrong, whatever its speed.
The winners belong into CONFIGS there. Exit code 1: the table itself is wrong; 2: no GPU.
"""

import argparse
import itertools
import sys

import torch

from bench import gpu
from bench.attention import HEADS, LIMIT, exact, gsm8k_lengths, inputs
from kernels import backend

CANDIDATES = [
    *itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3), (False, True))
]  # queries, keys, warps, stages, flip
CANDIDATES += itertools.product((128,), (64, 128), (4, 8), (4,), (False,))


class Case:
    """The tensors of one shape: every kernel writes into its own outputs and reads those of the table's kernels."""

    def __init__(self, lengths, size, device):
        from kernels import triton_attention as ta

        self.ta, self.lengths, self.tiles = ta, lengths, ta.tile_map(lengths).to(device)
        qkv, self.do = inputs(lengths, size, device)
        self.q, self.k, self.v = (x.detach() for x in qkv)
        self.o, self.lse = ta.attention(self.q, self.k, self.v, self.tiles)
        self.table = dict(
            zip(("forward", "queries", "keys"), ta.configs_for(device, size), strict=True)
        )
        self.delta = torch.empty_like(self.lse)
        self.want = {name: self.run(name, config) for name, config in self.table.items()}

    def run(self, name, config):
        """The outputs of a kernel under a options."""
        ta, (q, k, v, do) = self.ta, (self.q, self.k, self.v, self.do)
        heads, kv_heads = q.shape[1], k.shape[1]
        if name == "forward":
            out = torch.empty_like(q), torch.empty_like(self.lse)
            ta._launch(ta.forward_kernel, config, self.tiles[0], heads, config.rows, q, k, v, *out)
        elif name == "queries":
            out = (torch.empty_like(q),)
            ta._launch(
                ta.queries_kernel,
                config,
                self.tiles[0],
                heads,
                config.rows,
                q,
                k,
                v,
                self.o,
                do,
                self.lse,
                self.delta,
                *out,
            )
        else:
            out = torch.empty_like(k), torch.empty_like(v)
            ta._launch(
                ta.keys_kernel,
                config,
                self.tiles[1],
                kv_heads,
                config.keys,
                q,
                k,
                v,
                do,
                self.lse,
                self.delta,
                *out,
            )
        return out

    def right(self):
        """Whether the table's own results are those of the definition."""
        got = self.want["forward"][0], *self.want["queries"], *self.want["keys"]
        return all(
            gpu.relative_error(a, b) <= LIMIT
            for a, b in zip(
                got, exact((self.q, self.k, self.v), self.do, self.lengths), strict=True
            )
        )

    def measured(self, name, config, device):
        apart = max(
            gpu.relative_error(a, b)
            for a, b in zip(self.run(name, config), self.want[name], strict=True)
        )
        return apart, gpu.milliseconds(lambda: self.run(name, config), device, samples=7)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.attention_sweep")
    parser.add_argument(
        "--size", type=int, choices=sorted(HEADS), default=64, help="head dimension"
    )
    parser.add_argument("--json", default="sweep.json")
    parser.add_argument(
        "--dry", action="store_true", help=argparse.SUPPRESS
    )  # with TRITON_INTERPRET=1
    args = parser.parse_args(argv)
    device = gpu.device_or_exit(args.dry)
    backend.use("triton")
    shapes = (
        {"4 x 8192": [8192] * 4, "GSM8K 32768": gsm8k_lengths(32768)}
        if not args.dry
        else {"5 and 3": [5, 3]}
    )
    cases = {shape: Case(lengths, args.size, device) for shape, lengths in shapes.items()}
    right = Case([0, 1, 127, 129, 1000] if not args.dry else [0, 1, 7], args.size, device).right()
    config_of, rows = next(iter(cases.values())).ta.Config, []
    record = dict(environment=gpu.environment(device), right=right, rows=rows)
    with gpu.kept(record, args.json):
        sweep(cases, rows, config_of, args, device)
    return gpu.finish(record, args.json)


def sweep(cases, rows, config_of, args, device):
    """Appends to `rows`, and prints them."""
    for name in ("forward", "queries", "keys"):
        table = next(iter(cases.values())).table[name]
        for config in dict.fromkeys(
            [table, *(config_of(*c) for c in (CANDIDATES if not args.dry else CANDIDATES[:2]))]
        ):
            for shape, case in cases.items():
                if gpu.late(8):
                    continue
                got, why = gpu.attempt(lambda: case.measured(name, config, device))  # noqa: B023
                apart, ms = got or (None, None)
                note = why or ("WRONG" if apart > 2 * LIMIT else "")
                rows.append(
                    dict(
                        kernel=name,
                        shape=shape,
                        **vars(config),
                        table=config == table,
                        ms=ms,
                        apart=apart,
                        note=note,
                    )
                )
    for shape in cases:
        for name in ("forward", "queries", "keys"):
            these = [row for row in rows if row["kernel"] == name and row["shape"] == shape]
            good = sorted(
                (row for row in these if row["ms"] and not row["note"]), key=lambda row: row["ms"]
            )
            print(gpu.table([row for row in these if row["table"]] + good[:8]), end="\n\n")
    bad = [row for row in rows if row["note"] == "WRONG"]
    print(gpu.table(bad) if bad else "no configuration is wrong")


if __name__ == "__main__":
    sys.exit(main())
