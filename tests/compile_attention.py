"""The attention kernels of each configuration: what tests/compile_kernels.py compiles."""

from collections.abc import Iterator
from typing import Any

from kernels import decode_attention, triton_attention
from tests.compile_kernels import Compilation

BF16, FP32, TILES = "*bf16!", "*fp32!", "*i32"
HEADS = {64: (14, 2), 128: (12, 2), 256: (4, 1)}  # of Qwen2.5-0.5B and 1.5B and of Gemma 3 1B
KERNELS = (
    triton_attention.forward_kernel,
    triton_attention.queries_kernel,
    triton_attention.keys_kernel,
)


def packed_cases() -> Iterator[Compilation]:
    tables = [(80, triton_attention.CONFIGS[8]), (90, triton_attention.CONFIGS[9])]
    for capability, table in tables:
        for head_dim, configs in table.items():
            for kernel, config in zip(KERNELS, configs, strict=True):
                yield packed_case(capability, head_dim, kernel, config)


def packed_case(
    capability: int, head_dim: int, kernel: Any, config: triton_attention.Config
) -> Compilation:
    windowed = head_dim == 256  # where registers are scarcest, and what Gemma uses
    n_heads, n_kv_heads = HEADS[head_dim]
    names = kernel.arg_names
    types = dict.fromkeys(names[: names.index("tiles_ptr")], BF16)
    types |= dict(lse_ptr=FP32, tiles_ptr=TILES, tokens="i32", window="i32")
    if "delta_ptr" in names:
        types["delta_ptr"] = FP32
    constants = dict(
        H=n_heads,
        K=n_kv_heads,
        E=head_dim,
        TILE=triton_attention.TILE,
        ROWS=config.rows,
        KEYS=config.keys,
        TRANSPOSED=config.transposed,
        WINDOWED=windowed,
    )
    return Compilation(
        case=f"{kernel.__name__} E={head_dim}{' windowed' if windowed else ''}",
        kernel=kernel,
        types=types,
        constants=constants,
        capability=capability,
        warps=config.warps,
        stages=config.stages,
    )


def decode_cases() -> Iterator[Compilation]:
    for capability in (80, 90):
        for head_dim, lengths, stages in ((64, "*i64", 3), (128, "*i32", 3), (256, "*i64", 2)):
            n_heads, n_kv_heads = HEADS[head_dim]
            sizes = dict(
                K=n_kv_heads,
                GROUP=n_heads // n_kv_heads,
                L=1,
                E=head_dim,
                ROWS=decode_attention.ROWS,
                SPLIT=decode_attention.SPLIT,
                BLOCK=decode_attention.BLOCK,
                JOIN=decode_attention.JOIN,
                WINDOWED=head_dim == 256,
            )
            for steps in (1, 8):
                yield Compilation(
                    case=f"decode_kernel E={head_dim} L={steps}",
                    kernel=decode_attention.decode_kernel,
                    types=dict(part_ptr=FP32, lse_ptr=FP32, length_ptr=lengths)
                    | dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), BF16)
                    | dict(
                        arrived_ptr="*i32!", row_stride="i32!", head_stride="i32!", window="i32"
                    ),
                    constants=sizes | dict(L=steps),
                    capability=capability,
                    warps=decode_attention.WARPS,
                    stages=stages,
                )
            pointers = ("q_ptr", "k_ptr", "v_ptr", "cos_ptr", "sin_ptr", "rotated_ptr")
            strides = ("q_stride", "k_stride", "v_stride", "row_stride", "head_stride")
            yield Compilation(
                case=f"store_kernel E={head_dim}",
                kernel=decode_attention.store_kernel,
                types=dict.fromkeys((*pointers, "keys_ptr", "values_ptr"), BF16)
                | dict.fromkeys(strides, "i32!")
                | dict(slot_ptr="*i64"),
                constants=dict(H=n_heads, K=n_kv_heads, E=head_dim),
                capability=capability,
                warps=1,
                stages=3,
            )


def cases() -> Iterator[Compilation]:
    yield from packed_cases()
    yield from decode_cases()
