"""Packed causal attention on a GPU: is it right, and how fast beside what PyTorch has.

    python -m bench.attention --json attention.json      # a few minutes

First correctness, for the configurations in use and for CANDIDATES, and with every assembler at
hand: against fp64 on ragged documents, packed against one by one to the bit, a document of NaN
beside others, 100 repeats to the bit. Then, for the shapes of Qwen2.5-0.5B (14 query heads, 2
key-value heads, dimension 64), of 1.5B (12, 2, 128) and of Gemma 3 (4, 1, 256): 16 x 2,048 and
4 x 8,192 tokens and 32,768 tokens of documents as long as GSM8K's, forward and backward. FLOPs are
those that a causal mask leaves: 4 E sum n (n + 1) / 2 a head, backward 2.5 times as many.
Competitors get key-value heads repeated beforehand where they cannot group, and FlexAttention its
mask. Exit code 1: a check failed; 2: no GPU.
"""

import contextlib
import functools
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import measure
from bench.assemblers import check_with_others
from bench.measure import Bench
from kernels import backend
from kernels.attention import PackedAttention
from kernels.triton_attention import Config

# Checked and timed on Hopper beside the configurations in use (kernels/triton_attention.py), by
# name and head dimension: of the forward kernel, of the one that owns queries, of that of keys.
CANDIDATES = {
    "other": {
        64: [Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 128, 8, 2)],
        128: [Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 128, 8, 2)],
        256: [Config(64, 32, 8, 2), Config(32, 32, 4, 2), Config(32, 32, 8, 2)],
    }
}
IN_USE = "table"

HEADS = {64: (14, 2), 128: (12, 2), 256: (4, 1)}
# Tokens of GSM8K's 7,473 training rows in the Qwen2.5 chat template: every 5th percentile.
GSM8K = [75, 108, 118, 126, 132, 139, 145, 151, 157, 163, 169]
GSM8K += [176, 185, 193, 201, 211, 222, 237, 257, 287, 472]
# Relative error of bf16 results: twice what the roundings of probabilities and results leave
# (output 2.0e-3, gradients 2.5e-3).
LIMIT = 5e-3
RESULTS = ("o", "dq", "dk", "dv")
FIGURES = ("forward_ms", "backward_ms", "forward_tflops", "backward_tflops")

# A way to attend: its function without arguments, and the leaves that gradients reach.
Attend = tuple[Callable[[], Tensor], Sequence[Tensor]]


def gsm8k_lengths(tokens: int) -> list[int]:
    """Documents that fill `tokens`, of lengths drawn from the distribution; the last is cut."""
    rng, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        at = rng.random() * 20
        low, high = GSM8K[int(at)], GSM8K[int(at) + 1]
        lengths.append(min(round(low + (high - low) * (at % 1)), tokens - sum(lengths)))
    return lengths


def inputs(
    lengths: Sequence[int], size: int, device: torch.device, seed: int = 0
) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient from above, [T, heads, E] each."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, kv_heads = HEADS[size]

    def make(n: int) -> Tensor:
        shape = (sum(lengths), n, size)
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    qkv = [make(n).requires_grad_() for n in (heads, kv_heads, kv_heads)]
    return qkv, make(heads)


def exact(qkv: Sequence[Tensor], upstream: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """Output and gradients in fp64, document by document, from the definition."""
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    group = qkv[0].shape[1] // qkv[1].shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in leaves), strict=True):
        score = torch.einsum("ihe,jhe->hij", q, k.repeat_interleave(group, 1)) * q.shape[2] ** -0.5
        later = torch.ones(len(q), len(q), device=q.device, dtype=torch.bool).triu(1)
        weight = score.masked_fill(later, -torch.inf).softmax(2)
        outputs.append(torch.einsum("hij,jhe->ihe", weight, v.repeat_interleave(group, 1)))
    output = torch.cat(outputs)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.double())]


def ours(qkv: Sequence[Tensor], upstream: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    output = PackedAttention(lengths, upstream.device)(0, *qkv)
    return [output.detach(), *torch.autograd.grad(output, qkv, upstream)]


def names_of(device: torch.device) -> list[str]:
    """The configurations in use, and on Hopper the candidates."""
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] == 9:
        return [IN_USE, *CANDIDATES]
    return [IN_USE]


@contextlib.contextmanager
def configured(name: str) -> Iterator[None]:
    """The kernels with the configurations of that name."""
    from kernels import triton_attention

    in_use = triton_attention.configs_for
    if name != IN_USE:

        def candidate(device: torch.device, size: int):
            return CANDIDATES[name][size]

        triton_attention.configs_for = candidate
    try:
        yield
    finally:
        triton_attention.configs_for = in_use


# --- correctness ---------------------------------------------------------------------------------


def packed_equals_alone(
    qkv: Sequence[Tensor], upstream: Tensor, lengths: Sequence[int], got: Sequence[Tensor]
) -> bool:
    """Whether each document by itself gives the same bits as in the pack."""
    alone = []
    for i, n in enumerate(lengths):
        if n:
            leaves = [x.detach().split(lengths)[i].requires_grad_() for x in qkv]
            alone.append(ours(leaves, upstream.split(lengths)[i], [n]))
    joined = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    return measure.all_equal(joined, got)


def nan_stays_inside(
    qkv: Sequence[Tensor], upstream: Tensor, lengths: Sequence[int], got: Sequence[Tensor]
) -> bool:
    """Whether the last document but one, filled with NaN, changes no bit of the others."""
    changed = len(lengths) - 2
    poisoned = [x.detach().clone() for x in qkv]
    for x in poisoned:
        x.split(lengths)[changed].fill_(float("nan"))
    after = ours([x.requires_grad_() for x in poisoned], upstream, lengths)
    for before_T, after_T in zip(got, after, strict=True):
        documents = list(zip(before_T.split(lengths), after_T.split(lengths), strict=True))
        del documents[changed]
        if not all(torch.equal(a, b) for a, b in documents):
            return False
    return True


def check(device: torch.device, size: int, dry: bool) -> dict:
    """One set of configurations at one head dimension: a row of the record."""
    lengths = [0, 1, 127, 128, 129, 0, 63, 64, 65, 1000, 2500]
    repeated, times = [2048] * 16, 100
    if dry:
        lengths, repeated, times = [0, 1, 7, 8, 9, 30], [20] * 2, 2
    qkv, upstream = inputs(lengths, size, device)
    got = ours(qkv, upstream, lengths)
    errors = {}
    for name, a, b in zip(RESULTS, got, exact(qkv, upstream, lengths), strict=True):
        errors[name] = measure.relative_error(a, b)
    same = packed_equals_alone(qkv, upstream, lengths, got)
    inside = nan_stays_inside(qkv, upstream, lengths, got)
    qkv, upstream = inputs(repeated, size, device, 1)
    unequal = measure.unequal_repeats(lambda: ours(qkv, upstream, repeated), times)
    # the reference path of a dry run pads: not equal to the bit
    right = max(errors.values()) <= LIMIT and inside and unequal == 0 and (same or dry)
    return errors | {
        "packed_equals_alone": same,
        "nan_stays_inside": inside,
        "unequal_repeats": unequal,
        "right": right,
    }


def checks(bench: Bench) -> None:
    for name in names_of(bench.device):
        for size in HEADS:
            with configured(name):
                row, why = measure.attempt(functools.partial(check, bench.device, size, bench.dry))
            row = row or {"failed": why, "right": False}
            bench.check("checks", {"form": name, "E": size} | row)


# --- speed ---------------------------------------------------------------------------------------


def grouped_or_repeated(qkv: Sequence[Tensor], attend: Callable[..., Tensor]) -> Attend:
    """attend(q, k, v, group) as it is if it groups heads, else with key-value heads repeated."""
    grouped = functools.partial(attend, *qkv, True)
    if measure.attempt(grouped)[1] is None:
        return grouped, qkv
    group = qkv[0].shape[1] // qkv[1].shape[1]
    leaves = [qkv[0]]
    for x in qkv[1:]:
        leaves.append(x.detach().repeat_interleave(group, 1).requires_grad_())
    attend(*leaves, False)  # raises what is wrong
    return functools.partial(attend, *leaves, False), leaves


def packed_way(attend: PackedAttention, qkv: Sequence[Tensor]) -> Attend:
    return functools.partial(attend, 0, *qkv), qkv


def sdpa_way(kind: SDPBackend, lengths: Sequence[int], qkv: Sequence[Tensor]) -> Attend:
    """SDPA by one backend on documents of one length."""

    def attend(q: Tensor, k: Tensor, v: Tensor, group: bool) -> Tensor:
        shaped = [x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v)]
        with sdpa_kernel(kind):
            output = F.scaled_dot_product_attention(*shaped, is_causal=True, enable_gqa=group)
        return output.transpose(1, 2).flatten(0, 1)

    return grouped_or_repeated(qkv, attend)


def varlen_way(lengths: Sequence[int], qkv: Sequence[Tensor]) -> Attend:
    from torch.nn.attention.varlen import varlen_attn

    bounds = torch.tensor([0, *lengths], device=qkv[0].device).cumsum(0).int()
    # torch 2.11 has no such flag, and groups
    has_flag = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, group: bool) -> Tensor:
        options: dict[str, Any] = {"window_size": (-1, 0)}
        if group and has_flag:
            options["enable_gqa"] = True
        longest = max(lengths)
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, **options)

    return grouped_or_repeated(qkv, attend)


def flex_way(lengths: Sequence[int], qkv: Sequence[Tensor]) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device, tokens = qkv[0].device, sum(lengths)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    document_T = document_T.to(device)

    def seen(b, h, i, j):
        return (i >= j) & (document_T[i] == document_T[j])

    make_mask, flex = create_block_mask, flex_attention
    if device.type == "cuda":
        # every shape is compiled for itself; beyond a few, torch would run it uncompiled
        torch._dynamo.reset()
        make_mask = torch.compile(create_block_mask)
        flex = torch.compile(flex_attention, dynamic=False)
    mask = make_mask(seen, None, None, tokens, tokens, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, group: bool) -> Tensor:
        shaped = [x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)]
        return flex(*shaped, block_mask=mask, enable_gqa=group)[0].transpose(0, 1)

    return grouped_or_repeated(qkv, attend)


def ways(lengths: Sequence[int], device: torch.device) -> dict[str, Callable[..., Attend]]:
    """Functions from (q, k, v) to an `Attend`, by name."""
    packed = PackedAttention(lengths, device)
    found = {}
    for name in names_of(device):
        found[f"srlm {name}"] = functools.partial(packed_way, packed)
    kinds = [SDPBackend.MATH]
    if device.type == "cuda":
        kinds = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
        kinds.append(SDPBackend.EFFICIENT_ATTENTION)
    if len(set(lengths)) == 1:
        for kind in kinds:
            found[f"sdpa {kind.name.lower()}"] = functools.partial(sdpa_way, kind, lengths)
    found["varlen_attn"] = functools.partial(varlen_way, lengths)
    found["flex_attention"] = functools.partial(flex_way, lengths)
    return found


def speed(
    build: Callable[..., Attend], qkv: Sequence[Tensor], upstream: Tensor, lengths: Sequence[int]
) -> tuple[dict, Tensor]:
    """Milliseconds and TFLOP/s of a way, forward and backward, and its output."""
    heads, size = qkv[0].shape[1:]
    flops = 4 * heads * size * sum(n * (n + 1) / 2 for n in lengths)
    attend, leaves = build(qkv)
    with torch.no_grad():
        forward = measure.milliseconds(attend, upstream.device)
    output = attend()
    backward = measure.milliseconds(
        lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True), upstream.device
    )
    rates = flops / forward / 1e9, 2.5 * flops / backward / 1e9
    return dict(zip(FIGURES, (forward, backward, *rates), strict=True)), output.detach()


def speeds_of_shape(bench: Bench, size: int, shape: str, lengths: Sequence[int]) -> None:
    """All ways at one shape; "apart": a way's distance from the first one's output."""
    qkv, upstream = inputs(lengths, size, bench.device)
    first = None
    for name, build in ways(lengths, bench.device).items():
        if bench.out_of_time():
            return
        form = name.removeprefix("srlm ") if name.startswith("srlm ") else IN_USE
        with configured(form):
            got, why = measure.attempt(functools.partial(speed, build, qkv, upstream, lengths))
        row = {"E": size, "shape": shape, "way": name} | dict.fromkeys(FIGURES) | {"apart": None}
        if got:
            figures, output = got
            first = output if first is None else first
            row |= figures | {"apart": measure.relative_error(output, first)}
        row = bench.keep("speeds", row | {"note": why})
        print(measure.table([row]).splitlines()[1], file=sys.stderr, flush=True)


def speeds(bench: Bench) -> None:
    shapes = {"16 x 2048": [2048] * 16, "4 x 8192": [8192] * 4, "GSM8K 32768": gsm8k_lengths(32768)}
    if bench.dry:
        shapes = {"2 x 24": [24] * 2, "GSM8K 300": gsm8k_lengths(300)}
    for size in HEADS:
        for shape, lengths in shapes.items():
            speeds_of_shape(bench, size, shape, lengths)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--json", "attention.json", minutes=5)
    measure.add_check_options(parser)
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes, "" if args.only_check else args.path)
    backend.use("torch" if args.dry else "triton")
    checks(bench)
    if args.only_check:
        return bench.only_checked()
    speeds(bench)
    print(measure.table(bench.record.get("speeds", [{"speeds": "out of time"}])))
    if not args.dry and not args.one_assembler:
        check_with_others(bench, "bench.attention", limit_s=90)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
