"""The attention kernels of each configuration: what tests/compile_kernels.py compiles."""

from kernels import decode_attention as da
from kernels import triton_attention as ta

POINTER, FLOATS, TILES = "*bf16!", "*fp32!", "*i32"
GROUPS = {64: (14, 2), 128: (12, 2)}  # Qwen2.5-0.5B and 1.5B


def case(kernel, config, size):
    heads, kv_heads = GROUPS[size]
    types = dict.fromkeys(kernel.arg_names[: kernel.arg_names.index("tiles")], POINTER) | dict(
        lse=FLOATS, tiles=TILES, tokens="i32"
    )
    if "delta" in kernel.arg_names:
        types["delta"] = FLOATS
    constants = dict(
        H=heads,
        K=kv_heads,
        E=size,
        TILE=ta.TILE,
        ROWS=config.rows,
        KEYS=config.keys,
        SCALE=ta.LOG2E * size**-0.5,
        FLIP=config.flip,
    )
    return kernel, types, constants


def decode_cases(size, lengths):
    (heads, kv_heads), partial = GROUPS[size], dict(part=FLOATS, lse=FLOATS, lengths=lengths)
    sizes = dict(K=kv_heads, GROUP=heads // kv_heads, L=1, E=size, SPLIT=da.SPLIT)
    types = dict.fromkeys("qkv", POINTER) | partial | dict(row_stride="i32!", head_stride="i32!")
    yield (
        da.split_kernel,
        types,
        sizes | dict(ROWS=16, BLOCK=da.BLOCK, SCALE=ta.LOG2E * size**-0.5),
        da.WARPS,
        da.STAGES,
    )
    yield da.join_kernel, partial | dict(o=POINTER, splits="i32"), sizes | dict(JOIN=da.JOIN), 1, 3


KERNELS = (ta.forward_kernel, ta.queries_kernel, ta.keys_kernel)


def cases():
    tables = [(80, ta.CONFIGS[8]), (90, ta.CONFIGS[9]), (90, ta.OTHER)]
    for capability, table in tables:
        for size, configs in table.items():
            for kernel, config in zip(KERNELS, configs, strict=True):
                form = "flipped" if config.flip else "plain"
                yield (
                    f"{kernel.__name__} E={size} {form}",
                    (*case(kernel, config, size), capability, config.warps, config.stages),
                )
    for capability in (80, 90):
        for size, lengths in ((64, "*i64"), (128, "*i32")):
            for kernel, types, constants, warps, stages in decode_cases(size, lengths):
                yield (
                    f"{kernel.__name__} E={size}",
                    (kernel, types, constants, capability, warps, stages),
                )
