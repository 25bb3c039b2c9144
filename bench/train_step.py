"""Whole training steps of the 0.5B on a GPU: tokens per second, memory, and the share of the GPU's peak that they use.

    python -m bench.train_step --out train_step.json     # under 8 minutes
    python -m bench.train_step --dry                     # tiny bodies on a CPU: the script itself

The loop's own forward_backward, clipping and AdamW on random weights and tokens: bf16 compute, fp32 master weights, every token but the
first of a document trained on. SFT at 16 × 2,048 and 4 × 8,192 tokens, KD (forward KL) with a 1.5B teacher, with and
without torch.compile, by the Triton kernels and by the PyTorch path. Utilisation counts the head over loss rows only, the backward
as twice the forward, against 989 TFLOP/s of dense bf16 (H100, H200; model/flops.py has the others). The median of ten steps.
"""

import argparse
import functools
import sys

import numpy as np
import torch

from bench.gpu import Bench, environment, kept, table
from data.batch import Document, GlobalBatch
from kernels import backend
from losses.kd import KDConfig, kd_loss
from losses.sft import sft_loss
from model.checkpoint import build_model
from model.flops import peak_flops, step_flops
from model.optim import build_optimizer, clip_gradients
from model.transformer import PRESETS
from train import forward_backward

COLUMNS = ("mode", "batch", "kernels", "compile", "ms", "tokens/s", "utilisation", "gb", "failed")


def packed(count, length, vocab):
    rng = np.random.default_rng(0)
    weights = np.ones(length)
    weights[0] = 0
    documents = [Document(rng.integers(vocab, size=length), weights) for _ in range(count)]
    return GlobalBatch(documents)


def step_of(model, teacher, batch, vocab, device):
    optimizer = build_optimizer(model, 1e-5, (0.9, 0.95), 1e-8, 0.1)
    kd = functools.partial(kd_loss, cfg=KDConfig("forward_kl", vocab=vocab))
    loss_fn = kd if teacher else sft_loss

    def step():
        forward_backward(
            model, teacher, loss_fn, batch, batch.normalizer, sum(batch.lengths), device
        )
        clip_gradients(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def profile(step, path):
    """Which kernels a step spends its time in."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    report = found.key_averages().table(
        sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60
    )
    with open(path, "w") as f:
        f.write(report)


def main(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="train_step.json", help="everything as JSON")
    parser.add_argument(
        "--profile",
        default="",
        help="also write the time of each GPU kernel of the fastest KD step here",
    )
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="skip what has not begun by then"
    )
    parser.add_argument(
        "--dry", action="store_true", help="tiny bodies on a CPU, to try the script itself"
    )
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes)
    student, teacher = ("tiny", "tiny-teacher") if args.dry else ("qwen2.5-0.5b", "qwen2.5-1.5b")
    body = build_model(
        PRESETS[student], None, device=bench.device, seed=0, compute_dtype=bench.dtype
    )
    teacher = build_model(
        PRESETS[teacher], None, device=bench.device, seed=1, weight_dtype=bench.dtype
    ).requires_grad_(False)
    batches = ((2, 16), (1, 32)) if args.dry else ((16, 2048), (4, 8192))
    cases = [("sft", b, k, c) for b in batches for k, c in (("auto", True), ("auto", False))]
    cases += [("kd", b, k, c) for b in batches for k, c in (("auto", True), ("auto", False))]
    cases += [(mode, batches[0], "torch", True) for mode in ("sft", "kd")]
    peak = peak_flops(environment(bench.device)["device"])
    with kept(bench.record, args.out):
        run(bench, cases, body, teacher, peak, args)
    return bench.finish(args.out)


def run(bench, cases, body, teacher, peak, args):
    for mode, (count, length), kernels, compiled in cases:
        facts = {
            "mode": mode,
            "batch": f"{count} × {length}",
            "kernels": kernels,
            "compile": compiled,
        }
        if bench.out_of_time():
            bench.keep(facts | {"failed": "out of time"})
            continue
        backend.use(kernels)
        frozen = teacher if mode == "kd" else None
        for block in [*body.layers, *teacher.layers]:
            block.is_compiled = compiled and not args.dry
        vocab = 500 if args.dry else 151_665
        batch = packed(count, length, vocab)
        step = step_of(body, frozen, batch, vocab, bench.device)
        row = bench.measure(step, **facts)
        if "ms" in row:
            seconds = row["ms"] / 1e3
            row |= {"tokens/s": sum(batch.lengths) / seconds}
            if peak:
                row["utilisation"] = step_flops(batch, body, frozen, vocab) / seconds / peak
            if args.profile and mode == "kd" and not args.dry:
                profile(step, args.profile)
        print(table([row], COLUMNS).splitlines()[1], flush=True)
        del step
        body.zero_grad()
        if not args.dry:
            torch.cuda.empty_cache()
    backend.use("auto")
    print("\n" + table([r for r in bench.records], COLUMNS))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
