"""Packed causal attention on a GPU: is it right, and how fast beside what PyTorch has. One command, a few minutes:

    python -m bench.attention --json attention.json

First correctness, for both forms of every kernel (kernels/triton_attention.py: FLIP) and with every assembler at hand: against fp64 on ragged
documents, packed against one by one to the bit, a document of NaN beside others, 100 repeats to the bit. Then, for the shapes of
Qwen2.5-0.5B (14 query heads, 2 key-value heads, dimension 64) and 1.5B (12, 2, 128): 16 × 2,048 and 4 × 8,192 tokens and 32,768 tokens of
documents as long as GSM8K's, forward and backward. FLOPs are those that a causal mask leaves: 4 E Σ n (n + 1) / 2 a head, backward 2.5 times as
many. Competitors get key-value heads repeated beforehand where they cannot group, and FlexAttention its mask. Exit code 1: a check failed; 2: no GPU.
"""

import argparse
import contextlib
import functools
import inspect
import json
import random
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import gpu
from kernels import backend
from kernels.attention import PackedAttention

HEADS = {64: (14, 2), 128: (12, 2)}
# tokens of GSM8K's 7,473 training rows in the Qwen2.5 chat template: every 5th percentile; the mean is 180
GSM8K = [
    75,
    108,
    118,
    126,
    132,
    139,
    145,
    151,
    157,
    163,
    169,
    176,
    185,
    193,
    201,
    211,
    222,
    237,
    257,
    287,
    472,
]
LIMIT = 5e-3  # relative error of bf16 results: twice what the roundings of probabilities and results leave (output 2.0e-3, gradients 2.5e-3)


def gsm8k_lengths(tokens):
    """Documents that fill `tokens`, of lengths drawn from the distribution; the last one is cut."""
    rng, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        at = rng.random() * 20
        low, high = GSM8K[int(at)], GSM8K[int(at) + 1]
        lengths.append(min(round(low + (high - low) * (at % 1)), tokens - sum(lengths)))
    return lengths


def inputs(lengths, size, device, seed=0):
    """q, k, v and the gradient from above."""
    g = torch.Generator(device=device).manual_seed(seed)
    dtype, (heads, kv_heads) = (
        torch.bfloat16 if device.type == "cuda" else torch.float32,
        HEADS[size],
    )
    make = lambda n: torch.randn(sum(lengths), n, size, generator=g, device=device, dtype=dtype)
    return [make(n).requires_grad_() for n in (heads, kv_heads, kv_heads)], make(heads)


def exact(qkv, upstream, lengths):
    """Output and gradients in fp64, document by document, from the definition."""
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    outputs, group = [], qkv[0].shape[1] // qkv[1].shape[1]
    for q, k, v in zip(*(x.split(lengths) for x in leaves), strict=True):
        score = torch.einsum("ihe,jhe->hij", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
        score = score.masked_fill(
            torch.ones(len(q), len(q), device=q.device, dtype=torch.bool).triu(1), -torch.inf
        )
        outputs.append(
            torch.einsum("hij,jhe->ihe", score.softmax(2), v.repeat_interleave(group, 1))
        )
    o = torch.cat(outputs)
    return o.detach(), *torch.autograd.grad(o, leaves, upstream.double())


def ours(qkv, upstream, lengths):
    o = PackedAttention(lengths, upstream.device)(0, *qkv)
    return o.detach(), *torch.autograd.grad(o, qkv, upstream)


@contextlib.contextmanager
def form(name, device):
    """ "table": the configurations in use; "other": the other form of each on Hopper."""
    if device.type != "cuda" or name == "table":
        yield
        return
    from kernels import triton_attention

    kept, triton_attention.configs_for = (
        triton_attention.configs_for,
        lambda device, size: triton_attention.OTHER[size],
    )
    try:
        yield
    finally:
        triton_attention.configs_for = kept


def forms(device):
    return (
        ("table", "other")
        if device.type == "cuda" and torch.cuda.get_device_capability()[0] == 9
        else ("table",)
    )


def check(device, size, dry):
    """One form at one head dimension: errors against fp64 and what must hold to the bit."""
    lengths = [0, 1, 7, 8, 9, 30] if dry else [0, 1, 127, 128, 129, 0, 63, 64, 65, 1000, 2500]
    qkv, upstream = inputs(lengths, size, device)
    got = ours(qkv, upstream, lengths)
    errors = {
        name: gpu.relative_error(a, b)
        for name, a, b in zip(
            ("o", "dq", "dk", "dv"), got, exact(qkv, upstream, lengths), strict=True
        )
    }
    alone = [
        ours(
            [x.detach().split(lengths)[i].requires_grad_() for x in qkv],
            upstream.split(lengths)[i],
            [n],
        )
        for i, n in enumerate(lengths)
        if n
    ]
    apart = all(
        torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*alone), got, strict=True)
    )
    changed = len(lengths) - 2
    poisoned = [x.detach().clone() for x in qkv]
    for x in poisoned:
        x.split(lengths)[changed].fill_(float("nan"))
    after = ours([x.requires_grad_() for x in poisoned], upstream, lengths)
    parted = [(a.split(lengths), b.split(lengths)) for a, b in zip(got, after, strict=True)]
    kept = all(
        torch.equal(a[i], b[i]) for a, b in parted for i in range(len(lengths)) if i != changed
    )
    many = [20] * 2 if dry else [2048] * 16
    qkv, upstream = inputs(many, size, device, 1)
    unequal = gpu.unequal_repeats(lambda: ours(qkv, upstream, many), 2 if dry else 100)
    right = (
        max(errors.values()) <= LIMIT and kept and unequal == 0 and (apart or dry)
    )  # the reference pads: not equal to the bit
    return dict(
        E=size,
        **errors,
        packed_equals_alone=apart,
        nan_stays_inside=kept,
        unequal_repeats=unequal,
        right=right,
    )


def checks(device, dry):
    rows = []
    for name in forms(device):
        for size in HEADS:
            with form(name, device):
                row, why = gpu.attempt(lambda: check(device, size, dry))
            rows.append(dict(form=name) | (row or dict(E=size, failed=why, right=False)))
    return rows


# --- speed ---------------------------------------------------------------------------------------------------------


def repeated(x, n):
    return x.repeat_interleave(n // x.shape[1], 1)


def dense(qkv, lengths, kind):
    """SDPA by one backend on documents of one length: grouped if it can, else with repeated heads."""
    shaped = lambda x: x.unflatten(0, (len(lengths), -1)).transpose(1, 2)

    def f(q, k, v, group):
        with sdpa_kernel(kind):
            return (
                F.scaled_dot_product_attention(
                    shaped(q), shaped(k), shaped(v), is_causal=True, enable_gqa=group
                )
                .transpose(1, 2)
                .flatten(0, 1)
            )

    return grouped_or_repeated(qkv, f)


FLAG = "enable_gqa"


def varlen(qkv, lengths):
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths], device=qkv[0].device).cumsum(0).int()

    def f(q, k, v, group):
        more = (
            dict(enable_gqa=True)
            if group and FLAG in inspect.signature(varlen_attn).parameters
            else {}
        )  # torch 2.11 has no flag, and groups
        return varlen_attn(
            q, k, v, bounds, bounds, max(lengths), max(lengths), window_size=(-1, 0), **more
        )

    return grouped_or_repeated(qkv, f)


def flex(qkv, lengths, compiled):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()  # every shape is compiled for itself; beyond a few, torch would run it uncompiled
    device, tokens = qkv[0].device, sum(lengths)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    seen = lambda b, h, i, j: (i >= j) & (document[i] == document[j])
    mask = (torch.compile(create_block_mask) if compiled else create_block_mask)(
        seen, None, None, tokens, tokens, device=device
    )
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def f(q, k, v, group):
        shaped = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return attend(*shaped, block_mask=mask, enable_gqa=group)[0].transpose(0, 1)

    return grouped_or_repeated(qkv, f)


def grouped_or_repeated(qkv, f):
    """A function without arguments that attends, and its leaves."""
    grouped = lambda: f(*qkv, True)
    if gpu.attempt(grouped)[1] is None:
        return grouped, qkv
    leaves = [qkv[0], *(repeated(x.detach(), qkv[0].shape[1]).requires_grad_() for x in qkv[1:])]
    f(*leaves, False)  # raises what is wrong
    return functools.partial(f, *leaves, False), leaves


def ways(lengths, device):
    """name -> (qkv -> (attend, leaves))."""
    attend = PackedAttention(lengths, device)
    found = {f"srlm {name}": lambda qkv: (lambda: attend(0, *qkv), qkv) for name in forms(device)}
    if len(set(lengths)) == 1:
        kinds = (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        )
        kinds = kinds if device.type == "cuda" else (SDPBackend.MATH,)
        found |= {
            f"sdpa {kind.name.lower()}": lambda qkv, kind=kind: dense(qkv, lengths, kind)
            for kind in kinds
        }
    found["varlen_attn"] = lambda qkv: varlen(qkv, lengths)
    found["flex_attention"] = lambda qkv: flex(qkv, lengths, device.type == "cuda")
    return found


def speed(name, build, qkv, upstream, lengths, device):
    """Milliseconds and TFLOP/s of a way, forward and backward, and its distance from the first one's output."""
    heads, size = qkv[0].shape[1:]
    flops = 4 * heads * size * sum(n * (n + 1) / 2 for n in lengths)
    with (
        form(name.removeprefix("srlm "), device)
        if name.startswith("srlm")
        else contextlib.nullcontext()
    ):
        attend, leaves = build(qkv)
        with torch.no_grad():
            forward = gpu.milliseconds(attend, device)
        o = attend()
        backward = gpu.milliseconds(
            lambda: torch.autograd.grad(o, leaves, upstream, retain_graph=True), device
        )
    rate = lambda factor, ms: factor * flops / ms / 1e9
    return dict(
        forward_ms=forward,
        backward_ms=backward,
        forward_tflops=rate(1, forward),
        backward_tflops=rate(2.5, backward),
    ), o.detach()


def speeds(device, dry, minutes, rows):
    """Appends to `rows`."""
    shapes = {"16 x 2048": [2048] * 16, "4 x 8192": [8192] * 4, "GSM8K 32768": gsm8k_lengths(32768)}
    if dry:
        shapes = {"2 x 24": [24] * 2, "GSM8K 300": gsm8k_lengths(300)}
    for size in HEADS:
        for shape, lengths in shapes.items():
            qkv, upstream = inputs(lengths, size, device)
            first = None
            for name, build in ways(lengths, device).items():
                if gpu.late(minutes):
                    return
                got, why = gpu.attempt(lambda: speed(name, build, qkv, upstream, lengths, device))
                figures, o = got or (
                    dict.fromkeys(
                        ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops")
                    ),
                    None,
                )
                first = o if first is None else first
                apart = None if o is None or first is None else gpu.relative_error(o, first)
                rows.append(
                    dict(E=size, shape=shape, way=name) | figures | dict(apart=apart, note=why)
                )
                print(gpu.table(rows[-1:]).splitlines()[1], file=sys.stderr, flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.attention")
    parser.add_argument("--json", default="attention.json")
    parser.add_argument(
        "--only-check", action="store_true", help="checks alone; the last line is their record"
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="begin no measurement later")
    parser.add_argument("--dry", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    device = gpu.device_or_exit(args.dry)
    backend.use("torch" if args.dry else "triton")
    record = gpu.checked(device, checks(device, args.dry))
    if args.only_check:
        print(json.dumps(record))
        return 0 if record["right"] else 1
    with gpu.kept(record, args.json):
        speeds(device, args.dry, args.minutes, record.setdefault("speeds", []))
        print(gpu.table(record["speeds"]))
        record["other_assemblers"] = (
            {}
            if args.dry
            else gpu.tell_assemblers(gpu.checked_with_other_assemblers("bench.attention", 90))
        )
    return gpu.finish(record, args.json)


if __name__ == "__main__":
    sys.exit(main())
