"""Each use of the head's kernels in each configuration, for tests/compile_kernels.py."""

from collections.abc import Iterator
from typing import NamedTuple

import triton

from bench.head import TWO_PROGRAMS
from kernels import triton_head, triton_sampler
from kernels.divergences import FORMULAS
from kernels.triton_head import Config
from tests.compile_kernels import Compilation

FP32, FP16, BF16, IDS = "*fp32!", "*fp16!", "*bf16!", "*i64!"


class Use(NamedTuple):
    """The parts of a loss for which `gradient_kernel` computes the gradient."""

    divergence: str
    logprob: bool = False
    entropy: bool = False
    same_temperature: bool = False

    def __str__(self) -> str:
        parts = [self.divergence]
        parts += ["logprob"] * self.logprob + ["entropy"] * self.entropy
        return "+".join(parts + ["same"] * self.same_temperature)


GRADIENTS = [
    *(Use(name) for name in FORMULAS),
    Use("proportional"),
    Use("none", logprob=True),
    Use("none", logprob=True, entropy=True),
    Use("forward_kl", logprob=True, same_temperature=True),
    Use("proportional", logprob=True),
    Use("reverse_kl", logprob=True, entropy=True),
    Use("jsd", logprob=True, entropy=True),
    Use("skew_reverse_kl", logprob=True, entropy=True),
]
# S: logits are stored; M: moment; 2: another temperature for the divergence. None of them: the
# sampler, and scores; R, which stores logits in fp32: the sampler with top-k or top-p.
LOGITS = [(use, 896) for use in ("", "R", "S", "S2", "SM", "SM2", "M")] + [("S", 3584)]


def add_optional(types: dict, constants: dict, optional: dict[str, tuple[str, bool]]) -> None:
    """Unused pointers are the constant None."""
    for name, (kind, used) in optional.items():
        if used:
            types[name] = kind
        else:
            constants[name] = None


def logits_case(use: str, width: int, capability: int, config: Config) -> Compilation:
    store, moment, kl_sum = ("S" in use, "M" in use, "2" in use)
    raw = "R" in use

    def matrix(rows: int) -> str:
        return f"tensordesc<bf16[{rows}, {config.width}]>" if config.tma else BF16

    types = dict(x=matrix(config.rows), w=matrix(config.ids), max_ptr=FP32, sum_ptr=FP32)
    types |= dict.fromkeys(("n_rows", "vocab", "n_tiles", "group"), "i32")
    types |= dict.fromkeys(("inv_t", "inv_kl"), "fp32")
    constants = dict(
        D=width,
        ROWS=config.rows,
        IDS=config.ids,
        WIDTH=config.width,
        HALVES=config.halves,
        STORE=2 if raw else int(store),
        MOMENT=moment,
        KL_SUM=kl_sum,
        TMA=config.tma,
        FLATTEN=config.flatten,
    )
    optional = dict(
        z_ptr=(FP32 if raw else FP16, store or raw),
        moment_ptr=(FP32, moment),
        kl_sum_ptr=(FP32, kl_sum),
    )
    add_optional(types, constants, optional)
    return Compilation(
        case=f"logits {use} D={width} x{config.resident}",
        kernel=triton_head.logits_kernel,
        types=types,
        constants=constants,
        capability=capability,
        warps=config.warps,
        stages=config.stages,
    )


def gradient_case(use: Use, capability: int) -> Compilation:
    tile = triton_head.CONFIGS[capability // 10].tile
    pair = use.divergence not in ("none", "proportional")
    types = dict(s_ptr=FP16, grad_ptr=BF16, n_tiles="i32")
    types |= dict.fromkeys(("s_max_ptr", "s_row_ptr", "coefficient_ptr"), FP32)
    types |= dict.fromkeys(("inv_kl", "inv_lp", "beta"), "fp32")
    constants = dict(
        DIVERGENCE=use.divergence,
        LOGPROB=use.logprob,
        ENTROPY=use.entropy,
        SAME=use.same_temperature,
        WRITE=True,
        TILES=triton_head.ROW_BLOCK // tile,
        TILE=tile,
    )
    optional = dict(
        t_ptr=(FP16, pair),
        u_ptr=(BF16, pair),
        t_max_ptr=(FP32, pair),
        t_row_ptr=(FP32, pair),
        value_ptr=(FP32, pair),
        target_ptr=(IDS, use.logprob),
    )
    add_optional(types, constants, optional)
    return Compilation(
        case=f"gradient {use}",
        kernel=triton_head.gradient_kernel,
        types=types,
        constants=constants,
        capability=capability,
        warps=triton_head.ROW_WARPS,
        stages=3,
    )


def statistics_case(width: int, kl_sum: bool, capability: int) -> Compilation:
    """Without a width no target, and no moment."""
    target = width > 0
    types = dict(max_ptr=FP32, sum_ptr=FP32, row_ptr=FP32, x_ptr=BF16, w_ptr=BF16)
    types |= dict(vocab="i32", n_tiles="i32", inv_t="fp32", inv_kl="fp32")
    padded = triton.next_power_of_2(width)
    constants = dict(D=width, WIDTH=padded, TILES=2048)
    constants |= dict(MOMENT=target, KL_SUM=kl_sum, TARGET=target)
    optional = dict(
        moment_ptr=(FP32, target),
        kl_sum_ptr=(FP32, kl_sum),
        target_ptr=(IDS, target),
        target_logit_ptr=(FP32, target),
    )
    add_optional(types, constants, optional)
    return Compilation(
        case=f"statistics D={width} kl_sum={kl_sum}",
        kernel=triton_head.statistics_kernel,
        types=types,
        constants=constants,
        capability=capability,
        warps=triton_head.STATISTICS_WARPS,
        stages=3,
    )


def draw_case(greedy: bool, capability: int) -> Compilation:
    types = dict(x_ptr=BF16, w_ptr=BF16, max_ptr=FP32, sum_ptr=FP32, u_ptr="*fp64!")
    types |= dict(id_ptr=IDS, logp_ptr=FP32, vocab="i32", n_tiles="i32", inv_t="fp32")
    tile = triton_head.CONFIGS[capability // 10].tile
    constants = dict(D=896, TILE=tile, TILES=2048, WIDTH=triton_sampler.WIDTH, GREEDY=greedy)
    return Compilation(
        case=f"draw greedy={greedy}",
        kernel=triton_sampler.draw_kernel,
        types=types,
        constants=constants,
        capability=capability,
        warps=triton_sampler.WARPS,
        stages=3,
    )


def filtered_case(top_k: bool, top_p: bool, capability: int) -> Compilation:
    types = dict(z_ptr=FP32, list_ptr="*i32!", max_ptr=FP32, sum_ptr=FP32, u_ptr="*fp64!")
    types |= dict(id_ptr=IDS, logp_ptr=FP32, vocab="i32", n_tiles="i32", inv_t="fp32")
    types |= dict(top_k="i32", top_p="fp32")
    tile = triton_head.CONFIGS[capability // 10].tile
    block = triton_sampler.BLOCK
    return Compilation(
        case=f"filtered top_k={top_k} top_p={top_p}",
        kernel=triton_sampler.filtered_kernel,
        types=types,
        constants=dict(TILE=tile, TILES=2048, BLOCK=block, TOP_K=top_k, TOP_P=top_p),
        capability=capability,
        warps=triton_sampler.WARPS,
        stages=3,
    )


def cases() -> Iterator[Compilation]:
    for use, width in LOGITS:
        if use != "S2":  # a candidate, which would spill 8 bytes there
            yield logits_case(use, width, 90, TWO_PROGRAMS)
    for capability in (80, 90):
        for use, width in LOGITS:
            config = triton_head.CONFIGS[capability // 10]
            if capability == 80 and use in ("", "M"):
                config = triton_head.TILES_ALONE_8
            yield logits_case(use, width, capability, config)
        for width, kl_sum in ((0, False), (896, False), (896, True), (8192, True)):
            yield statistics_case(width, kl_sum, capability)
        for greedy in (False, True):
            yield draw_case(greedy, capability)
        for top_k, top_p in ((True, False), (False, True), (True, True)):
            yield filtered_case(top_k, top_p, capability)
        for use in GRADIENTS:
            yield gradient_case(use, capability)
