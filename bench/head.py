"""The vocabulary head on a GPU: fused logit-KL, cross-entropy and policy gradient, beside what a user would take instead.

    python -m bench.head --out head.json          # checks, then everything, under 8 minutes
    python -m bench.head --tune --out tune.json   # the logits kernel's configurations, the gradient kernel's, chunk sizes
    python -m bench.head --dry                    # tiny shapes on a CPU: the script itself

bf16, student width 896, teacher 1,536 and 3,584. Ours: V = 151,665 ids (a ragged last tile) of heads with 151,936 and 152,064 rows. The
others get all 151,936 rows, whose logits are aligned as their products want them. A time is the median of ten, forward and backward
together, by CUDA events; memory is the peak above the inputs. The ceiling is what cuBLAS takes for the matrix products that no exact
method avoids, over 151,680 aligned columns, in the same run. Peers run where they can be imported.
"""

import argparse
import json
import sys

import torch
import torch.nn.functional as F

from bench.gpu import Bench, checked_with_other_assemblers, table, tell_assemblers
from kernels import backend, triton_head
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob

VOCAB, ROWS, TEACHER_ROWS = 151_665, 151_936, 152_064
KL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # Liger's name for them
COLUMNS = ("loss", "N", "teacher", "who", "ms", "TFLOP/s", "of ceiling", "gb", "failed")


class Shapes:
    def __init__(self, bench, n, teacher_width=None):
        g = torch.Generator(bench.device).manual_seed(0)
        make = lambda rows, width, scale=1.0: (
            torch.randn(rows, width, generator=g, device=bench.device) * scale
        ).to(bench.dtype)
        self.n, self.width, self.teacher_width, self.vocab = (
            n,
            64 if bench.dry else 896,
            teacher_width,
            331 if bench.dry else VOCAB,
        )
        rows, teacher_rows = (352, 360) if bench.dry else (ROWS, TEACHER_ROWS)
        self.aligned, self.rows = -(-self.vocab // 128) * 128 if not bench.dry else 352, rows
        self.hidden, self.head = (
            make(n, self.width).requires_grad_(),
            make(rows, self.width, 3 * self.width**-0.5).requires_grad_(),
        )
        if teacher_width:
            self.teacher_hidden, self.teacher_head = (
                make(n, teacher_width),
                make(teacher_rows, teacher_width, 3 * teacher_width**-0.5),
            )
        self.target = torch.randint(self.vocab, (n,), generator=g, device=bench.device)
        self.weight = torch.full((n,), 1 / n, device=bench.device)
        self.old = (self.hidden * self.head[self.target]).sum(
            1
        ).float().detach() - 16.4  # about the log-prob: log V + the logits' variance / 2
        self.advantage = torch.randn(n, generator=g, device=bench.device)

    def flop(self):
        return 2 * self.n * self.vocab * (3 * self.width + (self.teacher_width or 0))

    def step(self, loss):
        """One forward and backward of loss(shapes) -> scalar."""
        self.hidden.grad = self.head.grad = None
        loss(self).backward()
        return True


# --- the losses, ours and others' ----------------------------------------------------------------------------------


def ours_kl(name):
    return lambda s: linear_kl(
        s.hidden, s.head, s.teacher_hidden, s.teacher_head, s.weight, name, vocab=s.vocab
    )[0]


def ours_ce(s):
    return linear_logprob(
        s.hidden, s.head, s.target, s.weight, lambda logp, *_: -logp, vocab=s.vocab
    )[0]


def clipped(logp, entropy, fields):
    ratio = (logp - fields["old"]).exp()
    return (
        -torch.minimum(ratio * fields["advantage"], ratio.clamp(0.8, 1.2) * fields["advantage"])
        - 0.01 * entropy
    )


def ours_policy(s):
    fields = {"old": s.old, "advantage": s.advantage}
    return linear_logprob(
        s.hidden, s.head, s.target, s.weight, clipped, fields, entropy=True, vocab=s.vocab
    )[0]


def plain_kl(name, hidden, head, teacher_hidden, teacher_head, vocab):
    """What a user writes first: fp32 log-softmax of whole logits."""
    ls = F.log_softmax((hidden @ head[:vocab].t()).float(), -1)
    with torch.no_grad():
        lt = F.log_softmax((teacher_hidden @ teacher_head[:vocab].t()).float(), -1)
    if name == "forward_kl":
        return F.kl_div(ls, lt, reduction="batchmean", log_target=True)
    if name == "reverse_kl":
        return F.kl_div(lt, ls, reduction="batchmean", log_target=True)
    lm = torch.logaddexp(ls, lt) - 0.6931471805599453
    return 0.5 * (
        F.kl_div(lm, ls, reduction="batchmean", log_target=True)
        + F.kl_div(lm, lt, reduction="batchmean", log_target=True)
    )


def plain_ce(hidden, head, target, vocab):
    return F.cross_entropy((hidden @ head[:vocab].t()).float(), target)


def plain_policy(hidden, head, target, old, advantage, vocab):
    ls = F.log_softmax((hidden @ head[:vocab].t()).float(), -1)
    return clipped(
        ls.gather(1, target[:, None]).squeeze(1),
        -(ls.exp() * ls).sum(-1),
        {"old": old, "advantage": advantage},
    ).mean()


def with_torch_path(loss):
    def run(s):
        was = backend.chosen()
        backend.use("torch")
        try:
            return loss(s)
        finally:
            backend.use(was)

    return run


def liger():
    """Liger's fused linear JSD and cross-entropy, or nothing."""
    try:
        from liger_kernel.transformers.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyLoss,
        )
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD
    except Exception as e:
        print(f"Liger cannot be imported ({type(e).__name__}: {e})", flush=True)
        return {}
    jsd = lambda name: LigerFusedLinearJSD(jsd_beta=KL_BETA[name])
    return {
        **{
            name: lambda s, f=jsd(name): f(
                s.hidden, s.head, s.teacher_hidden, s.teacher_head[: s.rows], None
            )
            for name in KL_BETA
        },
        "ce": lambda s, f=LigerFusedLinearCrossEntropyLoss(): f(s.head, s.hidden, s.target),
    }


LIGER = {}  # filled by main


def others(name, compiled):
    """{who: loss} that compute `name` with other means; compiled: also torch.compile (tens of seconds each)."""
    kl = lambda f: lambda s: f(name, s.hidden, s.head, s.teacher_hidden, s.teacher_head, s.rows)
    ce = lambda f: lambda s: f(s.hidden, s.head, s.target, s.rows)
    policy = lambda f: lambda s: f(s.hidden, s.head, s.target, s.old, s.advantage, s.rows)
    call, plain, mine = {
        "ce": (ce, plain_ce, ours_ce),
        "policy": (policy, plain_policy, ours_policy),
    }.get(name, (kl, plain_kl, ours_kl(name)))
    found = {"chunked PyTorch": with_torch_path(mine), "plain PyTorch": call(plain)}
    if compiled:
        found["torch.compile"] = call(torch.compile(plain, dynamic=False))
    if name in LIGER:
        found["Liger"] = LIGER[name]
    if name == "ce" and hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = lambda s: F.linear_cross_entropy(
            s.hidden, s.head, s.target
        )
        if options := getattr(torch.nn, "LinearCrossEntropyOptions", None) or getattr(
            F, "LinearCrossEntropyOptions", None
        ):
            found["F.linear_cross_entropy, chunked"] = lambda s: F.linear_cross_entropy(
                s.hidden, s.head, s.target, options=options()
            )
    return found


# --- correctness, first --------------------------------------------------------------------------------------------


def exact_step(s, loss_of_logits):
    """fp64 loss and gradients of hidden rows and head."""
    hidden, head = (x.detach().double().requires_grad_() for x in (s.hidden, s.head))
    loss = loss_of_logits(hidden @ head[: s.vocab].t())
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def check_size(bench):
    return (4, 128) if bench.dry else (64, 1536)


def close_shapes(bench):
    """A teacher that nearly agrees with the student: the same head and rows, a little moved, in a wider space."""
    s = Shapes(bench, *check_size(bench))
    with torch.no_grad():
        s.teacher_head.zero_()[: len(s.head), : s.width] = s.head.detach()
        s.teacher_hidden[:, : s.width] = s.hidden.detach() + 0.02 * torch.randn_like(s.hidden)
    return s


def check(bench):
    """Errors of every loss against fp64 on unrelated and on close pairs, 100 repeats bit for bit. Returns whether all is well."""
    rows, good = [], True
    cases = [("ce", ours_ce), ("policy", ours_policy), *((name, ours_kl(name)) for name in KL_BETA)]
    for pair, s in (
        ("unrelated", Shapes(bench, *check_size(bench))),
        ("close", close_shapes(bench)),
    ):
        target, fields = s.target, {"old": s.old.double(), "advantage": s.advantage.double()}
        lt = (s.teacher_hidden.double() @ s.teacher_head[: s.vocab].double().t()).log_softmax(1)
        logp = lambda z: z.log_softmax(1).gather(1, target[:, None]).squeeze(1)
        entropy = lambda z: -(z.log_softmax(1).exp() * z.log_softmax(1)).sum(1)
        exact = {
            "ce": lambda z: -logp(z).mean(),
            "policy": lambda z: clipped(logp(z), entropy(z), fields).mean(),
            "forward_kl": lambda z: (lt.exp() * (lt - z.log_softmax(1))).sum(1).mean(),
            "reverse_kl": lambda z: (
                (z.log_softmax(1).exp() * (z.log_softmax(1) - lt)).sum(1).mean()
            ),
            "jsd": lambda z: _jsd(z.log_softmax(1), lt).mean(),
        }
        for name, ours in cases:
            loss, *want = exact_step(s, exact[name])
            s.step(ours)
            first = [s.hidden.grad.clone(), s.head.grad.clone()]
            value = ours(s).detach()
            same = 0
            for _ in range(1 if bench.dry else 100):
                s.step(ours)
                same += all(torch.equal(a, b.grad) for a, b in zip(first, (s.hidden, s.head)))
            error = [float((a.double() - b).norm() / b.norm()) for a, b in zip(first, want)]
            off = float((value.double() - loss).abs() / loss.abs())
            fine = max(error) < 1e-2 and off < 2e-2 and same == (1 if bench.dry else 100)
            good &= fine
            rows.append(
                {
                    "loss": name,
                    "pair": pair,
                    "value": float(loss),
                    "value off": off,
                    "dX off": error[0],
                    "dW off": error[1],
                    "same bits": same,
                    "": "" if fine else "WRONG",
                }
            )
    print(table(rows, ("loss", "pair", "value", "value off", "dX off", "dW off", "same bits", "")))
    bench.keep({"check": rows})
    return good


def _jsd(ls, lt):
    lm = torch.logaddexp(ls, lt) - 0.6931471805599453
    return 0.5 * ((ls.exp() * (ls - lm)).sum(1) + (lt.exp() * (lt - lm)).sum(1))


# --- speed ---------------------------------------------------------------------------------------------------------


def ceilings(bench, s):
    """Milliseconds of cuBLAS for each product: student logits, teacher logits, gradient of the rows, of the head."""
    with torch.no_grad():
        head, grad = (
            s.head[: s.aligned].detach(),
            torch.randn(s.n, s.aligned, device=bench.device, dtype=bench.dtype),
        )
        found = {"student": bench.milliseconds(lambda: s.hidden.detach() @ head.t())}
        if s.teacher_width:
            found["teacher"] = bench.milliseconds(
                lambda: s.teacher_hidden @ s.teacher_head[: s.aligned].t()
            )
        found["dX"] = bench.milliseconds(lambda: grad @ head)
        found["dW"] = bench.milliseconds(lambda: grad.t() @ s.hidden.detach())
    return found


def compare(bench, s, names, products, compiled):
    """Time each loss and its peers at one shape."""
    ceiling = sum(products.values())
    for name in names:
        ours = ours_ce if name == "ce" else ours_policy if name == "policy" else ours_kl(name)
        for who, loss in {"ours": ours, **others(name, compiled)}.items():
            s.hidden.grad = s.head.grad = None
            if not bench.dry:
                torch.cuda.empty_cache()
            row = bench.measure(
                lambda: s.step(loss), loss=name, N=s.n, teacher=s.teacher_width, who=who
            )
            if "ms" in row:
                row |= {"TFLOP/s": s.flop() / row["ms"] / 1e9, "of ceiling": ceiling / row["ms"]}
            print(table([row], COLUMNS).splitlines()[1], flush=True)


def scoring(bench, s, product):
    """Log-probs without gradients, beside the one product they need."""
    run = lambda: linear_logprob(
        s.hidden.detach(), s.head.detach(), s.target, s.weight, lambda logp, *_: logp, vocab=s.vocab
    )
    row = bench.measure(run, loss="score", N=s.n, who="ours")
    if "ms" in row:
        row |= {
            "of ceiling": product / row["ms"],
            "TFLOP/s": 2 * s.n * s.vocab * s.width / row["ms"] / 1e9,
        }
    print(table([row], COLUMNS).splitlines()[1], flush=True)


def stages(bench, s, products):
    """Where the time of our forward KL goes: each kernel and product by itself."""
    logits = lambda x, w, out: triton_head.logits(x, w[: s.vocab].detach(), out_nP=out)
    student_out, teacher_out = (
        triton_head.buffer(s.n, s.vocab, x) for x in (s.hidden, s.teacher_hidden)
    )
    student, teacher = (
        logits(s.hidden.detach(), s.head, student_out),
        logits(s.teacher_hidden, s.teacher_head, teacher_out),
    )
    coefficient = torch.zeros(s.n, 3, device=bench.device) + 1 / s.n
    grad = student_out.view(bench.dtype)[:, : s.rows]
    width = grad.shape[1]
    wide = torch.empty(width, s.width, device=bench.device)
    runs = {
        "logits kernel, student": lambda: logits(s.hidden.detach(), s.head, student_out),
        "logits kernel, teacher": lambda: logits(s.teacher_hidden, s.teacher_head, teacher_out),
        "gradient kernel, forward KL": lambda: triton_head.gradient(
            student, teacher, divergence="forward_kl", coefficient_n3=coefficient, dtype=bench.dtype
        ),
        "gradient kernel, JSD": lambda: triton_head.gradient(
            student, teacher, divergence="jsd", coefficient_n3=coefficient, dtype=bench.dtype
        ),
        "gradient kernel, CE": lambda: triton_head.gradient(
            student, coefficient_n3=coefficient, target_n=s.target, dtype=bench.dtype
        ),
        "dX": lambda: torch.mm(
            grad, s.head[:width].detach(), **({} if bench.dry else {"out_dtype": torch.float32})
        ),
        "dW into fp32": lambda: torch.mm(
            grad.t(),
            s.hidden.detach(),
            **({} if bench.dry else {"out_dtype": torch.float32}),
            out=wide,
        ),
    }
    for name, run in runs.items():
        print(
            table(
                [bench.measure(run, stage=name, N=s.n)], ("stage", "ms", "gb", "failed")
            ).splitlines()[1],
            flush=True,
        )
    print("cuBLAS: " + ", ".join(f"{k} {v:.2f} ms" for k, v in products.items()), flush=True)


def tune(bench):
    """Every candidate of the logits kernel at one shape, then blocks and warps of the gradient kernel, then chunk sizes."""
    C = triton_head.Config
    shapes = [
        (256, 128, 64, 8, 3),
        (256, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 256, 64, 8, 4),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
    ]
    candidates = [
        C(*k, flatten=f, tma=True, halves=h)
        for k in shapes
        for f in (False, True)
        for h in (False, True)
    ]
    candidates += [
        C(128, 128, 64, w, 3, resident=2, flatten=f, tma=True, halves=h)
        for w in (4, 8)
        for f in (False, True)
        for h in (False, True)
    ]
    candidates += [C(*k) for k in [*shapes, (128, 128, 32, 8, 4), (128, 128, 64, 4, 3)]]
    s, chosen, found = (
        Shapes(bench, 4 if bench.dry else 8192, 128 if bench.dry else 1536),
        triton_head.config_for,
        [],
    )
    product = bench.milliseconds(lambda: s.hidden.detach() @ s.head[: s.vocab].detach().t())
    for config in candidates[:2] if bench.dry else candidates:
        if not bench.dry:
            triton_head.config_for = lambda device: config
        out = triton_head.buffer(s.n, s.vocab, s.hidden)
        row = bench.measure(
            lambda: triton_head.logits(s.hidden.detach(), s.head[: s.vocab].detach(), out_nP=out),
            config=str(config),
        )
        found.append(row | ({"of cuBLAS": product / row["ms"]} if "ms" in row else {}))
        print(
            table(found[-1:], ("config", "ms", "of cuBLAS", "failed")).splitlines()[1], flush=True
        )
    triton_head.config_for = chosen
    print(
        "best first:\n"
        + table(
            sorted((r for r in found if "ms" in r), key=lambda r: r["ms"])[:8],
            ("config", "ms", "of cuBLAS"),
        )
    )
    student, teacher = (
        triton_head.logits(
            x.detach(), w[: s.vocab].detach(), out_nP=triton_head.buffer(s.n, s.vocab, x)
        )
        for x, w in ((s.hidden, s.head), (s.teacher_hidden, s.teacher_head))
    )
    coefficient, default = (
        torch.zeros(s.n, 3, device=bench.device),
        (triton_head.ROW_BLOCK, triton_head.ROW_WARPS),
    )
    for block, warps in (
        [(4096, 8)]
        if bench.dry
        else [(1024, 4), (2048, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16)]
    ):
        triton_head.ROW_BLOCK, triton_head.ROW_WARPS = block, warps
        for name in ("forward_kl", "jsd"):
            run = lambda: triton_head.gradient(
                student, teacher, divergence=name, coefficient_n3=coefficient, dtype=bench.dtype
            )
            print(
                table(
                    [bench.measure(run, stage=f"{name} block {block} warps {warps}")],
                    ("stage", "ms", "failed"),
                ).splitlines()[1],
                flush=True,
            )
    triton_head.ROW_BLOCK, triton_head.ROW_WARPS = default
    for rows in (2,) if bench.dry else (1024, 2048, 4096, 8192):
        loss = lambda s: linear_kl(
            s.hidden,
            s.head,
            s.teacher_hidden,
            s.teacher_head,
            s.weight,
            "forward_kl",
            vocab=s.vocab,
            chunk_rows=rows,
        )[0]
        s.hidden.grad = s.head.grad = None
        print(
            table(
                [bench.measure(lambda: s.step(loss), stage=f"chunks of {rows}")],
                ("stage", "ms", "gb", "failed"),
            ).splitlines()[1],
            flush=True,
        )


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="head.json", help="everything as JSON")
    parser.add_argument(
        "--only-check", action="store_true", help="correctness alone; the last line is its record"
    )
    parser.add_argument("--tune", action="store_true", help="configurations instead of comparisons")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="skip what has not begun by then"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny shapes on a CPU, to try the script itself"
    )
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes)
    if args.dry:
        backend.use("triton")
        triton_head.config_for = lambda device: triton_head.Config(16, 128, 64, 4, 1)
    right, others = check(bench), {}
    if args.only_check:
        print(json.dumps({"right": right, "records": bench.records}))
        return 0 if right else 1
    try:
        others = {} if args.dry else tell_assemblers(checked_with_other_assemblers("bench.head"))
        right &= all(other.get("right", True) for other in others.values())
        LIGER.update({} if args.dry else liger())
        (tune if args.tune else everything)(bench)
    finally:  # what was measured is kept, whatever happened then
        code = bench.finish(args.out, right=right, other_assemblers=others)
    return code


def everything(bench):
    print("  ".join(COLUMNS), flush=True)
    sizes, teachers = ((4, 6), (128,)) if bench.dry else ((8192, 2048, 16384), (1536, 3584))
    for n in sizes:
        for teacher in teachers:
            s = Shapes(bench, n, teacher)
            products = ceilings(bench, s)
            bench.keep({"N": n, "teacher": teacher, "cuBLAS": products})
            first = n == sizes[0] and teacher == teachers[0]
            if first:
                stages(bench, s, products)
            compare(bench, s, KL_BETA, products, compiled=first and not bench.dry)
        s.teacher_width = None
        student = {k: v for k, v in products.items() if k != "teacher"}
        compare(bench, s, ("ce", "policy"), student, compiled=n == sizes[0] and not bench.dry)
        scoring(bench, s, products["student"])
    print("\n" + table([r for r in bench.records if "who" in r], COLUMNS))
    bench.keep({"copy ceiling, bytes/s": bench.copy_ceiling()})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
