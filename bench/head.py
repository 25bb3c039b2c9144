"""The vocabulary head on a GPU: fused logit-KL, cross-entropy and policy gradient, beside peers.

    python -m bench.head --out head.json          # checks, then everything, under 8 minutes
    python -m bench.head --tune --out tune.json   # configurations of the kernels, chunk sizes
    python -m bench.head --dry                    # tiny shapes under Triton's interpreter, on a CPU

bf16, student width 896, teacher 1,536 and 3,584. Ours: V = 151,665 ids (a ragged last tile) of
heads with 151,936 and 152,064 rows. The others get all 151,936 rows, whose logits are aligned as
their products want them. A time is the median of ten, forward and backward together, by CUDA
events; memory is the peak above the inputs. The ceiling is what cuBLAS takes for the matrix
products that no exact method avoids, over 151,680 aligned columns, in the same run. Peers run
where they can be imported.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from bench.assemblers import check_with_others
from bench.measure import Bench
from bench.processes import interpreted
from kernels import backend, triton_head, triton_sampler
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob
from kernels.triton_head import Config
from model.sampling import NUCLEUS, Sampler, keep_top_p

# What --tune tries for the logits kernel: rows, ids, width, warps, stages.
TILES = [
    (256, 128, 64, 8, 3),
    (256, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
]
# One stores its tile while the other multiplies: to be tried before all others. If it is the faster
# one, it becomes the entry of 9 in `triton_head.CONFIGS`.
TWO_PROGRAMS = Config(128, 128, 64, 4, 3, resident=2, tma=True, halves=True)
SWITCHES = list(itertools.product((False, True), (False, True)))
CANDIDATES = [triton_head.CONFIGS[9], TWO_PROGRAMS]
CANDIDATES += [
    Config(*tile, flatten=flatten, tma=True, halves=halves)
    for tile in TILES
    for flatten, halves in SWITCHES
]
CANDIDATES += [
    Config(128, 128, 64, warps, 3, resident=2, flatten=flatten, tma=True, halves=halves)
    for warps in (4, 8)
    for flatten, halves in SWITCHES
]
CANDIDATES += [Config(*tile) for tile in [*TILES, (128, 128, 32, 8, 4), (128, 128, 64, 4, 3)]]
CANDIDATES = list(dict.fromkeys(CANDIDATES))
# Of the gradient kernel: ids per step, warps.
GRADIENT_BLOCKS = [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)]
CHUNKS = (1024, 2048, 4096, 8192)

VOCAB, ROWS, TEACHER_ROWS = 151_665, 151_936, 152_064
KL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # Liger's name for them
COLUMNS = ("loss", "N", "teacher", "who", "ms", "TFLOP/s", "of ceiling", "gb", "failed")
STAGE_COLUMNS = ("stage", "ms", "gb", "failed")
CONFIG_COLUMNS = ("config", "ms", "of cuBLAS", "failed")
LOG2 = 0.6931471805599453


class Shapes:
    """Random hidden rows, heads, targets and fields of the policy loss, of one size."""

    def __init__(self, bench: Bench, n: int, teacher_width: int | None = None) -> None:
        self.n, self.teacher_width = n, teacher_width
        self.width, self.vocab, self.rows, teacher_rows = 896, VOCAB, ROWS, TEACHER_ROWS
        self.aligned = -(-VOCAB // 128) * 128  # columns of the ceiling's products
        if bench.dry:
            self.width, self.vocab, self.rows, teacher_rows = 64, 331, 352, 360
            self.aligned = 352
        generator = torch.Generator(bench.device).manual_seed(0)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=bench.device)

        hidden, head = make(n, self.width), make(self.rows, self.width) * 3 * self.width**-0.5
        self.hidden = hidden.to(bench.dtype).requires_grad_()
        self.head = head.to(bench.dtype).requires_grad_()
        if teacher_width:
            self.teacher_hidden = make(n, teacher_width).to(bench.dtype)
            teacher_head = make(teacher_rows, teacher_width) * 3 * teacher_width**-0.5
            self.teacher_head = teacher_head.to(bench.dtype)
        self.target = torch.randint(self.vocab, (n,), generator=generator, device=bench.device)
        self.weight = torch.full((n,), 1 / n, device=bench.device)
        # about the log-prob: log V + the logits' variance / 2
        self.old = (self.hidden * self.head[self.target]).sum(1).float().detach() - 16.4
        self.advantage = make(n)

    def flop(self) -> int:
        return 2 * self.n * self.vocab * (3 * self.width + (self.teacher_width or 0))

    def forget(self) -> None:
        self.hidden.grad = self.head.grad = None

    def step(self, loss: "Loss") -> None:
        """One forward and backward."""
        self.forget()
        loss(self).backward()


Loss = Callable[[Shapes], Tensor]

# --- the losses, ours and others' ----------------------------------------------------------------


def clipped(logp: Tensor, entropy: Tensor, fields: dict[str, Tensor]) -> Tensor:
    """The clipped policy loss per row, with a bonus for entropy."""
    ratio = (logp - fields["old"]).exp()
    advantage = fields["advantage"]
    return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage) - 0.01 * entropy


def negative(logp: Tensor, *_: Any) -> Tensor:
    return -logp


def ours_kl(name: str, s: Shapes, chunk_rows: int | None = None) -> Tensor:
    teacher = s.teacher_hidden, s.teacher_head
    options = {"vocab": s.vocab, "chunk_rows": chunk_rows}
    return linear_kl(s.hidden, s.head, *teacher, s.weight, name, **options)[0]


def ours_ce(s: Shapes) -> Tensor:
    return linear_logprob(s.hidden, s.head, s.target, s.weight, negative, vocab=s.vocab)[0]


def ours_policy(s: Shapes) -> Tensor:
    fields = {"old": s.old, "advantage": s.advantage}
    rows = s.hidden, s.head, s.target, s.weight
    return linear_logprob(*rows, clipped, fields, entropy=True, vocab=s.vocab)[0]


def ours(name: str) -> Loss:
    special = {"ce": ours_ce, "policy": ours_policy}
    return special.get(name) or functools.partial(ours_kl, name)


def torch_path(name: str, s: Shapes) -> Tensor:
    """Our loss by its PyTorch implementation."""
    was = backend.chosen()
    backend.use("torch")
    try:
        return ours(name)(s)
    finally:
        backend.use(was)


def log_softmax(hidden: Tensor, head: Tensor) -> Tensor:
    return F.log_softmax((hidden @ head.t()).float(), -1)


def divergence(target: Tensor, of: Tensor) -> Tensor:
    """KL(target || of) of log-probs, the mean over rows."""
    return F.kl_div(of, target, reduction="batchmean", log_target=True)


def plain_kl(
    name: str, hidden: Tensor, head: Tensor, teacher_hidden: Tensor, teacher_head: Tensor
) -> Tensor:
    """What a user writes first: fp32 log-softmax of whole logits."""
    ls = log_softmax(hidden, head)
    with torch.no_grad():
        lt = log_softmax(teacher_hidden, teacher_head)
    if name == "forward_kl":
        return divergence(lt, ls)
    if name == "reverse_kl":
        return divergence(ls, lt)
    lm = torch.logaddexp(ls, lt) - LOG2
    return 0.5 * (divergence(ls, lm) + divergence(lt, lm))


def plain_ce(hidden: Tensor, head: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ head.t()).float(), target)


def plain_policy(
    hidden: Tensor, head: Tensor, target: Tensor, old: Tensor, advantage: Tensor
) -> Tensor:
    ls = log_softmax(hidden, head)
    logp = ls.gather(1, target[:, None]).squeeze(1)
    entropy = -(ls.exp() * ls).sum(-1)
    return clipped(logp, entropy, {"old": old, "advantage": advantage}).mean()


def plain(name: str, compiled: bool, s: Shapes) -> Tensor:
    """PyTorch with whole logits, over all rows of the student's head."""
    function = {"ce": plain_ce, "policy": plain_policy}.get(name, plain_kl)
    if compiled:
        function = _compiled(function)
    if name == "ce":
        return function(s.hidden, s.head, s.target)
    if name == "policy":
        return function(s.hidden, s.head, s.target, s.old, s.advantage)
    return function(name, s.hidden, s.head, s.teacher_hidden, s.teacher_head[: s.rows])


@functools.cache
def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False)


@functools.cache
def liger() -> dict[str, Loss]:
    """Liger's fused linear JSD and cross-entropy by the names of our losses, or nothing."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except Exception as e:
        print(f"Liger cannot be imported ({type(e).__name__}: {e})", flush=True)
        return {}

    def jsd(module: Any, s: Shapes) -> Tensor:
        return module(s.hidden, s.head, s.teacher_hidden, s.teacher_head[: s.rows], None)

    def ce(module: Any, s: Shapes) -> Tensor:
        return module(s.head, s.hidden, s.target)

    found = {}
    for name, beta in KL_BETA.items():
        found[name] = functools.partial(jsd, LigerFusedLinearJSD(jsd_beta=beta))
    return found | {"ce": functools.partial(ce, LigerFusedLinearCrossEntropyLoss())}


def torch_fused_ce() -> dict[str, Loss]:
    """PyTorch's own fused cross-entropy, where this version has it."""
    fused = getattr(F, "linear_cross_entropy", None)
    if not fused:
        return {}
    found = {"F.linear_cross_entropy": lambda s: fused(s.hidden, s.head, s.target)}
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    options = options or getattr(F, "LinearCrossEntropyOptions", None)
    if options:
        found["F.linear_cross_entropy, chunked"] = lambda s: fused(
            s.hidden, s.head, s.target, options=options()
        )
    return found


def others(bench: Bench, name: str, compiled: bool) -> dict[str, Loss]:
    """What a user would take instead."""
    found: dict[str, Loss] = {
        "chunked PyTorch": functools.partial(torch_path, name),
        "plain PyTorch": functools.partial(plain, name, False),
    }
    if compiled:
        found["torch.compile"] = functools.partial(plain, name, True)
    if not bench.dry and name in liger():
        found["Liger"] = liger()[name]
    if name == "ce":
        found |= torch_fused_ce()
    return found


# --- correctness ---------------------------------------------------------------------------------


def close_shapes(bench: Bench, size: tuple[int, int]) -> Shapes:
    """A teacher that nearly agrees: the student's head and rows, moved, in a wider space."""
    s = Shapes(bench, *size)
    with torch.no_grad():
        s.teacher_head.zero_()[: len(s.head), : s.width] = s.head.detach()
        noise = torch.randn_like(s.hidden)
        s.teacher_hidden[:, : s.width] = s.hidden.detach() + 0.02 * noise
    return s


def exact_loss(name: str, s: Shapes, logits: Tensor) -> Tensor:
    """A loss from the definition, of fp64 logits."""
    ls = logits.log_softmax(1)
    logp = ls.gather(1, s.target[:, None]).squeeze(1)
    if name == "ce":
        return -logp.mean()
    if name == "policy":
        fields = {"old": s.old.double(), "advantage": s.advantage.double()}
        return clipped(logp, -(ls.exp() * ls).sum(1), fields).mean()
    lt = (s.teacher_hidden.double() @ s.teacher_head[: s.vocab].double().t()).log_softmax(1)
    if name == "forward_kl":
        return (lt.exp() * (lt - ls)).sum(1).mean()
    if name == "reverse_kl":
        return (ls.exp() * (ls - lt)).sum(1).mean()
    lm = torch.logaddexp(ls, lt) - LOG2
    return 0.5 * ((ls.exp() * (ls - lm)).sum(1) + (lt.exp() * (lt - lm)).sum(1)).mean()


def check_loss(name: str, s: Shapes, repeats: int) -> dict:
    """Errors of value and gradients against fp64, and how many repeats give the same bits."""
    hidden, head = (x.detach().double().requires_grad_() for x in (s.hidden, s.head))
    want = exact_loss(name, s, hidden @ head[: s.vocab].t())
    want_dx, want_dw = torch.autograd.grad(want, (hidden, head))
    value = ours(name)(s).detach()

    def gradients() -> list[Tensor]:
        s.step(ours(name))
        assert s.hidden.grad is not None and s.head.grad is not None
        return [s.hidden.grad, s.head.grad]

    dx, dw = gradients()
    row = {
        "value": float(want.detach()),
        "value off": measure.relative_error(value, want),
        "dX off": measure.relative_error(dx, want_dx),
        "dW off": measure.relative_error(dw, want_dw),
        "unequal repeats": measure.unequal_repeats(gradients, repeats),
    }
    right = max(row["dX off"], row["dW off"]) < 1e-2 and row["value off"] < 2e-2
    return row | {"right": right and not row["unequal repeats"]}


def check_draws(bench: Bench, temperature: float, top_p: float) -> dict:
    """Drawn ids, and their log-probs, against fp64.

    An id is right where its random number lies between the borders of its probability, but for
    rounding.
    """
    s = Shapes(bench, 4 if bench.dry else 64)
    hidden, head = s.hidden.detach(), s.head[: s.vocab].detach()
    u = torch.linspace(0.01, 0.99, s.n, device=bench.device, dtype=torch.float64)
    ids, logp = triton_sampler.draw(hidden, head, temperature, u, top_p=top_p)
    exact = (hidden.double() @ head.double().t() / (temperature or 1.0)).log_softmax(1)
    want = exact.gather(1, ids[:, None]).squeeze(1)
    if temperature:
        kept = exact.exp()
        if top_p < 1:
            kept = F.normalize(keep_top_p(kept, top_p, NUCLEUS), p=1)
        above, own = (x.gather(1, ids[:, None]).squeeze(1) for x in (kept.cumsum(1), kept))
        outside = torch.maximum(u - above, above - own - u).max()
    else:
        outside = (exact.amax(1) - want).max()
    row = {"outside": float(outside), "logp off": float((logp - want).abs().max())}
    return row | {"right": max(row.values()) < 1e-4}


def checks(bench: Bench) -> None:
    """Every loss on unrelated and on close pairs, and what is drawn."""
    for filters in ((0.0, 1.0), (0.7, 1.0), (1.0, 1.0), (0.6, 0.95)):
        row, why = measure.attempt(functools.partial(check_draws, bench, *filters))
        row = row or {"failed": why, "right": False}
        bench.check("checks", {"draws at temperature, top-p": filters} | row)
    size, repeats = ((4, 128), 1) if bench.dry else ((64, 1536), 100)
    pairs = {"unrelated": Shapes(bench, *size), "close": close_shapes(bench, size)}
    for pair, s in pairs.items():
        for name in ("ce", "policy", *KL_BETA):
            row, why = measure.attempt(functools.partial(check_loss, name, s, repeats))
            row = row or {"failed": why, "right": False}
            bench.check("checks", {"loss": name, "pair": pair} | row)


# --- speed ---------------------------------------------------------------------------------------


def ceilings(bench: Bench, s: Shapes) -> dict[str, float]:
    """Milliseconds of cuBLAS for each product, "teacher" only where there is one."""
    hidden, head = s.hidden.detach(), s.head[: s.aligned].detach()
    grad = torch.randn(s.n, s.aligned, device=bench.device, dtype=bench.dtype)
    found = {"student": bench.milliseconds(lambda: hidden @ head.t())}
    if s.teacher_width:
        teacher_head = s.teacher_head[: s.aligned]
        found["teacher"] = bench.milliseconds(lambda: s.teacher_hidden @ teacher_head.t())
    found["dX"] = bench.milliseconds(lambda: grad @ head)
    found["dW"] = bench.milliseconds(lambda: grad.t() @ hidden)
    return found


def compare(bench: Bench, s: Shapes, name: str, ceiling: float, compiled: bool) -> None:
    """Time a loss and its peers at one shape."""
    for who, loss in {"ours": ours(name), **others(bench, name, compiled)}.items():
        s.forget()
        facts = {"loss": name, "N": s.n, "teacher": s.teacher_width, "who": who}
        row = bench.measure(functools.partial(s.step, loss), **facts)
        if "ms" in row:
            row |= {"TFLOP/s": s.flop() / row["ms"] / 1e9, "of ceiling": ceiling / row["ms"]}
        bench.keep("speed", row, COLUMNS)


def scoring(bench: Bench, s: Shapes, product: float) -> None:
    """Log-probs without gradients, beside the one product that they need."""
    rows = s.hidden.detach(), s.head.detach(), s.target, s.weight
    row = bench.measure(
        lambda: linear_logprob(*rows, negative, vocab=s.vocab), loss="score", N=s.n, who="ours"
    )
    if "ms" in row:
        tflops = 2 * s.n * s.vocab * s.width / row["ms"] / 1e9
        row |= {"of ceiling": product / row["ms"], "TFLOP/s": tflops}
    bench.keep("speed", row, COLUMNS)


def drawing(bench: Bench, s: Shapes) -> None:
    """A token for each row of a decoding step, without and with evaluation's top-p."""
    backends = {"ours": "triton", "PyTorch": "torch"}
    for n in (2, 3) if bench.dry else (64, 256):
        hidden = s.hidden[:n].detach()
        u = torch.linspace(0.01, 0.99, n, device=bench.device, dtype=torch.float64)
        for who, top_p in itertools.product(backends, (1.0, 0.95)):
            was = backend.chosen()
            backend.use(backends[who])
            sampler = Sampler(s.head.detach(), s.vocab, n, temperature=1.0, top_p=top_p)
            run = functools.partial(sampler, hidden, u)
            row = bench.measure(run, loss=f"draw, top-p {top_p}", N=n, who=who)
            backend.use(was)
            bench.keep("speed", row, COLUMNS)


class Stages:
    """Our kernels one by one, on logits that are kept."""

    def __init__(self, bench: Bench, s: Shapes) -> None:
        self.bench, self.s = bench, s
        self.student_out = triton_head.buffer(s.n, s.vocab, s.hidden)
        self.teacher_out = triton_head.buffer(s.n, s.vocab, s.teacher_hidden)
        self.student, self.teacher = self.student_logits(), self.teacher_logits()
        self.coefficient = torch.full((s.n, 3), 1 / s.n, device=bench.device)

    def student_logits(self) -> triton_head.Logits:
        head = self.s.head[: self.s.vocab].detach()
        return triton_head.logits(self.s.hidden.detach(), head, out_nP=self.student_out)

    def teacher_logits(self) -> triton_head.Logits:
        head = self.s.teacher_head[: self.s.vocab]
        return triton_head.logits(self.s.teacher_hidden, head, out_nP=self.teacher_out)

    def gradient(self, name: str) -> None:
        options = {"coefficient_n3": self.coefficient, "dtype": self.bench.dtype}
        if name == "ce":
            triton_head.gradient(self.student, target_n=self.s.target, **options)
        else:
            triton_head.gradient(self.student, self.teacher, divergence=name, **options)

    def time(self, stage: str, run: Callable[[], Any]) -> None:
        self.bench.keep("stages", self.bench.measure(run, stage=stage, N=self.s.n), STAGE_COLUMNS)

    def time_all(self) -> None:
        s = self.s
        self.time("logits kernel, student", self.student_logits)
        self.time("logits kernel, teacher", self.teacher_logits)
        for name in ("forward_kl", "jsd", "ce"):
            self.time(f"gradient kernel, {name}", functools.partial(self.gradient, name))
        grad = self.student_out.view(self.bench.dtype)[:, : s.rows]
        hidden, head = s.hidden.detach(), s.head[: grad.shape[1]].detach()
        wide = torch.empty(head.shape, device=self.bench.device)
        options: dict = {} if self.bench.dry else {"out_dtype": torch.float32}
        self.time("dX", lambda: torch.mm(grad, head, **options))
        self.time("dW into fp32", lambda: torch.mm(grad.t(), hidden, **options, out=wide))


def everything(bench: Bench) -> None:
    sizes, teachers = (8192, 2048, 16384), (1536, 3584)
    if bench.dry:
        sizes, teachers = (4, 6), (128,)
    print("  ".join(COLUMNS), flush=True)
    for n in sizes:
        products = {}
        for teacher in teachers:
            s = Shapes(bench, n, teacher)
            products = ceilings(bench, s)
            bench.keep("cuBLAS", {"N": n, "teacher": teacher} | products)
            first = n == sizes[0] and teacher == teachers[0]
            if first:
                Stages(bench, s).time_all()
                parts = [f"{name} {ms:.2f} ms" for name, ms in products.items()]
                print("cuBLAS: " + ", ".join(parts), flush=True)
            for name in KL_BETA:
                compare(bench, s, name, sum(products.values()), first and not bench.dry)
        s.teacher_width = None
        ceiling = sum(products.values()) - products["teacher"]
        for name in ("ce", "policy"):
            compare(bench, s, name, ceiling, n == sizes[0] and not bench.dry)
        scoring(bench, s, products["student"])
        if n == sizes[0]:
            drawing(bench, s)
    print("\n" + measure.table(bench.record["speed"], COLUMNS))
    bench.put("copy ceiling, bytes/s", bench.copy_ceiling())


# --- configurations ------------------------------------------------------------------------------


@contextmanager
def configured(config: Config) -> Iterator[None]:
    """The logits kernel with this configuration."""
    in_use = triton_head.config_for
    triton_head.config_for = lambda device: config
    try:
        yield
    finally:
        triton_head.config_for = in_use


def tune_logits(bench: Bench, s: Shapes) -> None:
    hidden, head = s.hidden.detach(), s.head[: s.vocab].detach()
    product = bench.milliseconds(lambda: hidden @ head.t())
    candidates = [triton_head.config_for(bench.device)] if bench.dry else CANDIDATES
    for config in candidates:
        with configured(config):
            out = triton_head.buffer(s.n, s.vocab, s.hidden)
            run = functools.partial(triton_head.logits, hidden, head, out_nP=out)
            row = bench.measure(run, config=str(config))
        if "ms" in row:
            row["of cuBLAS"] = product / row["ms"]
        bench.keep("logits", row, CONFIG_COLUMNS)
    good = [row for row in bench.record["logits"] if "ms" in row]
    good.sort(key=lambda row: row["ms"])
    print("best first:\n" + measure.table(good[:8], CONFIG_COLUMNS))


def tune_gradient(bench: Bench, s: Shapes) -> None:
    stages = Stages(bench, s)
    in_use = triton_head.ROW_BLOCK, triton_head.ROW_WARPS
    for block, warps in GRADIENT_BLOCKS[:1] if bench.dry else GRADIENT_BLOCKS:
        triton_head.ROW_BLOCK, triton_head.ROW_WARPS = block, warps
        for name in ("forward_kl", "jsd"):
            run = functools.partial(stages.gradient, name)
            stages.time(f"{name} block {block} warps {warps}", run)
    triton_head.ROW_BLOCK, triton_head.ROW_WARPS = in_use


def tune(bench: Bench) -> None:
    """The logits kernel's candidates at one shape, the gradient kernel's, then chunk sizes."""
    s = Shapes(bench, *((4, 128) if bench.dry else (8192, 1536)))
    tune_logits(bench, s)
    tune_gradient(bench, s)
    for rows in (2,) if bench.dry else CHUNKS:
        loss = functools.partial(ours_kl, "forward_kl", chunk_rows=rows)
        s.forget()
        row = bench.measure(functools.partial(s.step, loss), stage=f"chunks of {rows}", N=s.n)
        bench.keep("stages", row, STAGE_COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--out", "head.json", minutes=7)
    measure.add_check_options(parser)
    parser.add_argument("--tune", action="store_true", help="configurations, no comparisons")
    args = parser.parse_args(argv)
    if args.dry:
        code = interpreted("bench.head", sys.argv[1:] if argv is None else argv)
        if code is not None:
            return code
        backend.use("triton")
    bench = Bench(args.dry, args.minutes, "" if args.only_check else args.path)
    if not args.dry:
        return run(bench, args)
    with configured(Config(16, 128, 64, 4, 1)):
        return run(bench, args)


def run(bench: Bench, args: Any) -> int:
    checks(bench)
    if args.only_check:
        return bench.only_checked()
    if not args.dry and not args.one_assembler:
        check_with_others(bench, "bench.head", limit_s=150)
    if args.tune:
        tune(bench)
    else:
        everything(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
