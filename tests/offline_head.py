"""Every use that the head's functions make of their kernels, for each configuration: what tests/offline.py compiles."""


from kernels import triton_head as th

POINTER, IDS = "*fp32!", "*i64!"


def logits_case(config, width, use):
    store, moment, second, target = ("S" in use, "M" in use, "2" in use, "T" in use)
    matrix = lambda size: f"tensordesc<bf16[{size}, {config.width}]>" if config.tma else "*bf16!"
    types = dict(x=matrix(config.rows), w=matrix(config.ids), max_ptr=POINTER, sum_ptr=POINTER, n_rows="i32", vocab="i32", n_tiles="i32", inv_t="fp32", inv_t2="fp32")
    constants = dict(D=width, ROWS=config.rows, IDS=config.ids, WIDTH=config.width, HALVES=config.halves, STORE=store, MOMENT=moment, SECOND=second, TARGET=target, TMA=config.tma, FLATTEN=config.flatten)
    optional = dict(z_ptr=("*fp16!", store), moment_ptr=(POINTER, moment), sum2_ptr=(POINTER, second), target_ptr=(IDS, target), target_logit_ptr=(POINTER, target))
    for name, (kind, wanted) in optional.items():
        (types if wanted else constants)[name] = kind if wanted else None
    return th.logits_kernel, types, constants


def gradient_case(tile, divergence, logprob=False, entropy=False, same=False):
    kl = divergence != "none"
    types = dict(s_ptr="*fp16!", grad_ptr="*bf16!", s_max_ptr=POINTER, s_row_ptr=POINTER, coefficient_ptr=POINTER, n_tiles="i32", inv_kl="fp32", inv_lp="fp32", beta="fp32")
    constants = dict(DIVERGENCE=divergence, LOGPROB=logprob, ENTROPY=entropy, SAME=same, WRITE=True, TILES=th.ROW_BLOCK // tile, TILE=tile)
    optional = dict(t_ptr=("*fp16!", kl), t_max_ptr=(POINTER, kl), t_row_ptr=(POINTER, kl), value_ptr=(POINTER, kl), target_ptr=(IDS, logprob))
    for name, (kind, wanted) in optional.items():
        (types if wanted else constants)[name] = kind if wanted else None
    return th.gradient_kernel, types, constants


def cases():
    for capability in (80, 90):
        config = th.CONFIGS[capability // 10]
        for use in ("S", "ST2", "STM", "T", "TM"):
            for width in (896,) if use != "S" else (896, 3584):
                yield f"logits {use} D={width}", (*logits_case(config, width, use), capability, config.warps, config.stages)
        for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"):
            yield divergence, (*gradient_case(config.tile, divergence), capability, th.ROW_WARPS, 3)
        yield "ce", (*gradient_case(config.tile, "none", True), capability, th.ROW_WARPS, 3)
        yield "policy", (*gradient_case(config.tile, "none", True, True), capability, th.ROW_WARPS, 3)
        yield "forward_kl+ce", (*gradient_case(config.tile, "forward_kl", True, False, True), capability, th.ROW_WARPS, 3)
        yield "reverse_kl+policy", (*gradient_case(config.tile, "reverse_kl", True, True, False), capability, th.ROW_WARPS, 3)
