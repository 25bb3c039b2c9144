"""Every use that the head's functions make of their kernels, for each configuration: what tests/compile_kernels.py compiles."""

from kernels import triton_head as th
from kernels.divergences import FORMULAS

POINTER, IDS = "*fp32!", "*i64!"


def logits_case(config, width, use):
    store, moment, second, target = ("S" in use, "M" in use, "2" in use, "T" in use)
    matrix = lambda size: f"tensordesc<bf16[{size}, {config.width}]>" if config.tma else "*bf16!"
    types = dict(
        x=matrix(config.rows),
        w=matrix(config.ids),
        max_ptr=POINTER,
        sum_ptr=POINTER,
        n_rows="i32",
        vocab="i32",
        n_tiles="i32",
        group="i32",
        inv_t="fp32",
        inv_t2="fp32",
    )
    constants = dict(
        D=width,
        ROWS=config.rows,
        IDS=config.ids,
        WIDTH=config.width,
        HALVES=config.halves,
        STORE=store,
        MOMENT=moment,
        SECOND=second,
        TARGET=target,
        TMA=config.tma,
        FLATTEN=config.flatten,
    )
    optional = dict(
        z_ptr=("*fp16!", store),
        moment_ptr=(POINTER, moment),
        sum2_ptr=(POINTER, second),
        target_ptr=(IDS, target),
        target_logit_ptr=(POINTER, target),
    )
    for name, (kind, wanted) in optional.items():
        (types if wanted else constants)[name] = kind if wanted else None
    return th.logits_kernel, types, constants


def gradient_case(tile, divergence, logprob=False, entropy=False, same=False):
    kl = divergence not in ("none", "proportional")
    types = dict(
        s_ptr="*fp16!",
        grad_ptr="*bf16!",
        s_max_ptr=POINTER,
        s_row_ptr=POINTER,
        coefficient_ptr=POINTER,
        n_tiles="i32",
        inv_kl="fp32",
        inv_lp="fp32",
        beta="fp32",
    )
    constants = dict(
        DIVERGENCE=divergence,
        LOGPROB=logprob,
        ENTROPY=entropy,
        SAME=same,
        WRITE=True,
        TILES=th.ROW_BLOCK // tile,
        TILE=tile,
    )
    optional = dict(
        t_ptr=("*fp16!", kl),
        u_ptr=("*bf16!", kl),
        t_max_ptr=(POINTER, kl),
        t_row_ptr=(POINTER, kl),
        value_ptr=(POINTER, kl),
        target_ptr=(IDS, logprob),
    )
    for name, (kind, wanted) in optional.items():
        (types if wanted else constants)[name] = kind if wanted else None
    return th.gradient_kernel, types, constants


def cases():
    """S: logits are kept; T: targets; M: entropy; 2: another temperature for the divergence."""
    for capability in (80, 90):
        config = th.CONFIGS[capability // 10]
        for use, width in [(use, 896) for use in ("S", "ST", "ST2", "STM", "STM2", "T", "TM")] + [
            ("S", 3584)
        ]:
            yield (
                f"logits {use} D={width}",
                (*logits_case(config, width, use), capability, config.warps, config.stages),
            )
        gradients = [(name, False, False, False) for name in (*FORMULAS, "proportional")]
        gradients += [
            ("none", True, False, False),
            ("none", True, True, False),
            ("forward_kl", True, False, True),
            ("proportional", True, False, False),
        ]
        gradients += [
            (name, True, True, False) for name in ("reverse_kl", "jsd", "skew_reverse_kl")
        ]
        for name, *uses in gradients:
            used = "".join(
                f"+{what}" for what, used in zip(("logprob", "entropy", "same"), uses) if used
            )
            yield (
                f"gradient {name}{used}",
                (*gradient_case(config.tile, name, *uses), capability, th.ROW_WARPS, 3),
            )
