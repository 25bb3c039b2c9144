"""What a GPU gives at most: a copy, and cuBLAS at the shapes of Qwen2.5-0.5B.

    python -m bench.ceilings --out ceilings.json

A device-to-device copy, a product of 8192 x 8192 matrices, the six matrices of the 0.5B with 32,768
and with 256 rows, and the gradient of hidden rows from logits whose leading dimension is odd
(151,665, as PyTorch's path of the head has it) or a multiple of 64.
"""

import sys
from collections.abc import Sequence

import torch

from bench import measure
from bench.measure import Bench

COLUMNS = ("what", "rows", "inner", "columns", "ms", "TFLOP/s", "failed")
# (inner dimension, columns)
MATRICES = {
    "q_proj": (896, 896),
    "k_proj": (896, 128),
    "o_proj": (896, 896),
    "up_proj": (896, 4864),
    "down_proj": (4864, 896),
    "head": (896, 151_936),
}


def product(bench: Bench, what: str, rows: int, inner: int, columns: int) -> None:
    facts = {"what": what, "rows": rows, "inner": inner, "columns": columns}
    if bench.dry:
        rows, inner, columns = 4, inner % 32 + 8, columns % 32 + 8

    def run() -> dict:
        left = torch.randn(rows, inner, device=bench.device, dtype=bench.dtype)
        right = torch.randn(inner, columns, device=bench.device, dtype=bench.dtype)
        return bench.measure(lambda: left @ right, **facts)

    row, why = measure.attempt(run)
    row = row or {**facts, "failed": why}
    if "ms" in row:
        row["TFLOP/s"] = 2 * rows * inner * columns / row["ms"] / 1e9
    bench.keep("products", row, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--out", "ceilings.json", minutes=2)
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes, args.path)
    bench.put("copy_bytes_per_s", bench.copy_ceiling())
    print(f"copy {bench.record['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    product(bench, "square", 8192, 8192, 8192)
    for rows in (32_768, 256):
        for name, (inner, columns) in MATRICES.items():
            product(bench, name, rows, inner, columns)
    for inner in (151_665, 151_680):
        product(bench, "gradient of hidden rows", 8192, inner, 896)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
