"""Whole training steps of the 0.5B on a GPU: tokens per second, memory, and the share of its peak.

    python -m bench.train_step --out train_step.json     # under 8 minutes
    python -m bench.train_step --dry                     # tiny bodies on a CPU: the script itself

The loop's own forward_backward, clipping and AdamW on random weights and tokens: bf16 compute, fp32
master weights, every token but the first of a document trained on. SFT at 16 x 2,048 and 4 x 8,192
tokens, KD (forward KL) with a 1.5B teacher, with and without torch.compile, by the Triton kernels
and by the PyTorch path. Utilisation counts the head over loss rows only, the backward as twice the
forward, against 989 TFLOP/s of dense bf16 (H100, H200; model/flops.py has the others). The median
of ten steps.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench import measure
from bench.measure import Bench
from data.batch import Document, GlobalBatch
from kernels import backend
from losses.kd import KDConfig, kd_loss
from losses.sft import sft_loss
from model.checkpoint import build_model
from model.flops import peak_flops, step_flops
from model.optim import build_optimizer, clip_gradients
from model.presets import PRESETS
from model.transformer import Transformer
from train import forward_backward

COLUMNS = ("mode", "batch", "kernels", "compile", "ms", "tokens/s", "utilisation", "gb", "failed")


class Case(NamedTuple):
    """mode: "sft" or "kd"; batch: documents and their length; kernels: as --kernels."""

    mode: str
    batch: tuple[int, int]
    kernels: str
    compiled: bool


class Bodies(NamedTuple):
    """Student and teacher, and how many ids their tokenizer has."""

    student: Transformer
    teacher: Transformer
    vocab: int


def random_batch(count: int, length: int, vocab: int) -> GlobalBatch:
    """Documents of random tokens, all but the first of them trained on."""
    rng = np.random.default_rng(0)
    weights = np.ones(length)
    weights[0] = 0
    documents = []
    for _ in range(count):
        documents.append(Document(rng.integers(vocab, size=length), weights))
    return GlobalBatch(documents)


def step_of(
    student: Transformer, teacher: Transformer | None, batch: GlobalBatch, vocab: int
) -> Callable[[], None]:
    """One training step: KD with a teacher, SFT without."""
    optimizer = build_optimizer(student, 1e-5, (0.9, 0.95), 1e-8, 0.1)
    loss_fn = sft_loss
    if teacher:
        loss_fn = functools.partial(kd_loss, cfg=KDConfig("forward_kl", vocab=vocab))
    device, tokens = student.head_VD.device, sum(batch.lengths)

    def step() -> None:
        teachers = [teacher] if teacher else []
        forward_backward(student, teachers, loss_fn, batch, batch.normalizer, tokens, device)
        clip_gradients(student, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def profile(step: Callable[[], Any], path: str) -> None:
    """Write which kernels a step spends its time in."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    report = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60
    )
    Path(path).write_text(report)


def all_cases(dry: bool) -> list[Case]:
    batches = ((2, 16), (1, 32)) if dry else ((16, 2048), (4, 8192))
    cases = []
    for mode in ("sft", "kd"):
        for batch in batches:
            cases += [Case(mode, batch, "auto", True), Case(mode, batch, "auto", False)]
    return cases + [Case(mode, batches[0], "torch", True) for mode in ("sft", "kd")]


def measure_case(bench: Bench, case: Case, bodies: Bodies, profile_path: str) -> None:
    count, length = case.batch
    facts = {
        "mode": case.mode,
        "batch": f"{count} x {length}",
        "kernels": case.kernels,
        "compile": case.compiled,
    }
    if bench.out_of_time():
        bench.keep("records", facts | {"failed": "out of time"}, COLUMNS)
        return
    backend.use(case.kernels)
    teacher = bodies.teacher if case.mode == "kd" else None
    for model in (bodies.student, bodies.teacher):
        for block in model.layers:
            block.is_compiled = case.compiled and not bench.dry
    batch = random_batch(count, length, bodies.vocab)
    step = step_of(bodies.student, teacher, batch, bodies.vocab)
    row = bench.measure(step, **facts)
    if "ms" in row:
        seconds = row["ms"] / 1e3
        row["tokens/s"] = sum(batch.lengths) / seconds
        peak = peak_flops(bench.record["environment"]["device"])
        if peak:
            flops = step_flops(batch, bodies.student, teacher, bodies.vocab)
            row["utilisation"] = flops / seconds / peak
    bench.keep("records", row, COLUMNS)
    if profile_path and teacher and "ms" in row and not bench.dry:
        profile(step, profile_path)
    bodies.student.zero_grad()
    if not bench.dry:
        torch.cuda.empty_cache()


def build(bench: Bench) -> Bodies:
    names, vocab = ("qwen2.5-0.5b", "qwen2.5-1.5b"), 151_665
    if bench.dry:
        names, vocab = ("tiny", "tiny-teacher"), 500
    options: dict[str, Any] = {"device": bench.device}
    student = build_model(PRESETS[names[0]], None, seed=0, compute_dtype=bench.dtype, **options)
    teacher = build_model(PRESETS[names[1]], None, seed=1, weight_dtype=bench.dtype, **options)
    return Bodies(student, teacher.requires_grad_(False), vocab)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--out", "train_step.json", minutes=7)
    parser.add_argument(
        "--profile", default="", help="write the time of each GPU kernel of the last KD step here"
    )
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes, args.path)
    bodies = build(bench)
    for case in all_cases(args.dry):
        measure_case(bench, case, bodies, args.profile)
    backend.use("auto")
    print("\n" + measure.table(bench.record["records"], COLUMNS))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
