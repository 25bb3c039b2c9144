"""One KD step at the full vocabulary on a CPU, beside what a user would write first.

    python -m bench.kd_step --data path/to/gsm8k/train.jsonl --tokenizer path/to/qwen2.5-tokenizer
    python -m bench.kd_step --dry       # tiny bodies and random tokens: the script itself

Student 4 layers x hidden 256, teacher 6 x 384 (152,064 rows), the first 8 rows of GSM8K's
train.jsonl, forward KL, fp32, 2 threads. Three ways, each in its own process, interleaved, the
median of `--repeats` steps:
  ours            the loop's own forward_backward, chunked head
  padded logits   plain PyTorch: [B, L, V] logits of both models, masked afterwards
  selected rows   plain PyTorch: the loss rows are selected before the head, [N, V] logits of both
Also timed in the same run, at the same shapes and in the faster of the CPU's two libraries: the
four matrix products of the heads that no exact method avoids (both models' logits, the gradients of
hidden rows and head), and these with the products of both bodies. A step is forward, backward,
clipping and AdamW. Memory is the process's peak above its resident size before there was an
optimizer, so that model weights count for nobody.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import median_ratio, resident_gb
from bench.processes import in_turn, serve
from bench.train_step import random_batch
from data.batch import Batch, GlobalBatch
from kernels.chunk import default_chunk_rows, product
from kernels.cpu import fastest_product, keep_freed_memory
from losses.kd import KDConfig, kd_loss
from model.checkpoint import build_model
from model.optim import build_optimizer, clip_gradients
from model.presets import PRESETS
from model.transformer import ModelConfig, Transformer
from train import forward_backward

WAYS = ("ours", "padded logits", "selected rows", "head products", "all products")
CPU = torch.device("cpu")


def load(args: argparse.Namespace) -> tuple[Batch, int]:
    """The first 8 rows of the data, and how many ids the tokenizer has."""
    if args.dry:
        return Batch.pack(random_batch(8, 24, 500).documents), 500
    from data.formats import read_rows, to_example
    from data.formatter import Formatter
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(args.tokenizer)
    rows = itertools.islice(read_rows(Path(args.data)), 8)
    examples = [to_example(row, origin) for origin, row in rows]
    return Batch.pack(Formatter(tokenizer).documents(examples)), tokenizer.size


def hidden_states(model: Transformer, tokens_BL: Tensor) -> Tensor:
    """Right-padded rows as documents of equal length: what padded training computes."""
    from kernels.attention import PackedAttention

    size, length = tokens_BL.shape
    positions = torch.arange(length).repeat(size)
    return model(tokens_BL.flatten(), positions, PackedAttention([length] * size))


def plain_loss(
    student: Transformer, teacher: Transformer, batch: Batch, vocab: int, select: bool
) -> Tensor:
    """Forward KL of whole logits; `select`: of the loss rows alone, as a careful user has it."""

    def padded(x_T: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(x_T.split(batch.lengths)), batch_first=True)

    tokens_BL, weight = padded(batch.tokens_T), padded(batch.weight_T.float()).flatten()
    hidden = hidden_states(student, tokens_BL)
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, tokens_BL)
    if select:
        rows = weight.nonzero().squeeze(1)
        hidden, teacher_hidden, weight = hidden[rows], teacher_hidden[rows], weight[rows]
    log_s = F.log_softmax(hidden @ student.head_VD.t()[:, :vocab], -1)
    with torch.no_grad():
        log_t = F.log_softmax(teacher_hidden @ teacher.head_VD.t()[:, :vocab], -1)
    kl = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    return (kl * weight).sum() / weight.sum()


def our_loss(student: Transformer, teacher: Transformer, batch: Batch, vocab: int) -> float:
    """The loss of one pass of the loop, its gradients left in the student."""
    loss_fn = functools.partial(kd_loss, cfg=KDConfig("forward_kl", vocab=vocab))
    documents = GlobalBatch(batch.documents)
    sums = forward_backward(student, [teacher], loss_fn, documents, batch.normalizer, 8192, CPU)
    return float(sums["loss"][0] / sums["loss"][1])


def head_products(student: Transformer, teacher: Transformer, n: int, vocab: int) -> None:
    """The four products over n rows, in the chunks of `linear_kl`, buffers allocated once."""
    chunk = default_chunk_rows(vocab, n, CPU, models=2)
    head, teacher_head = student.head_VD.detach()[:vocab], teacher.head_VD.detach()[:vocab]
    hidden, teacher_hidden = torch.randn(n, head.shape[1]), torch.randn(n, teacher_head.shape[1])
    z = torch.empty(min(n, chunk), vocab)
    grad_head, grad_hidden = torch.empty_like(head), torch.empty_like(hidden)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        x = hidden[rows]
        product(teacher_hidden[rows], teacher_head.t(), z[: len(x)])
        logits = product(x, head.t(), z[: len(x)])
        product(logits, head, grad_hidden[rows])
        product(logits.t(), x, grad_head, add=start > 0)


def body_products(config: ModelConfig, tokens: int, times: int) -> None:
    """The products of a body's forward; three times: of its backward, too."""
    d, f = config.hidden_size, config.intermediate_size
    qkv = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    shapes = [(d, qkv), (config.num_heads * config.head_dim, d), (d, 2 * f), (f, d)]
    for width, depth in shapes:
        x, weight = torch.randn(tokens, width), torch.randn(width, depth)
        for _ in range(times * config.num_layers):
            with fastest_product(x, tokens * width * depth):
                x @ weight


def child(args: argparse.Namespace) -> None:
    """One way, a step per line of standard input."""
    torch.set_num_threads(args.threads)
    batch, vocab = load(args)
    names = ("tiny", "tiny-teacher") if args.dry else ("small", "small-teacher")
    student = build_model(PRESETS[names[0]], None, device="cpu", seed=0)
    teacher = build_model(PRESETS[names[1]], None, device="cpu", seed=1).requires_grad_(False)
    if args.way == "ours" or args.way.endswith("products"):
        keep_freed_memory()  # as `train.py` does; what building models freed is gone
    before = resident_gb()
    optimizer = build_optimizer(student, 1e-4, (0.9, 0.95), 1e-8, 0.0)

    def step() -> dict:
        if args.way.endswith("products"):
            head_products(student, teacher, len(batch.rows_N), vocab)
            if args.way == "all products":
                body_products(teacher.config, len(batch.tokens_T), 1)
                body_products(student.config, len(batch.tokens_T), 3)
            return {"loss": 0.0}
        if args.way == "ours":
            loss = our_loss(student, teacher, batch, vocab)
        else:
            total = plain_loss(student, teacher, batch, vocab, args.way == "selected rows")
            total.backward()
            loss = total.item()
        clip_gradients(student, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss}

    facts = {"rows": len(batch.rows_N), "tokens": len(batch.tokens_T), "vocab": vocab}
    serve(facts, step, before)


def report(results: dict[str, list[dict]]) -> None:
    """A line per way: the median of the steps after the warm-up, the peak, how ours compares."""
    seconds, peak = {}, {}
    for way, steps in results.items():
        seconds[way] = [step["seconds"] for step in steps[1:]]
        peak[way] = max(step["gb"] for step in steps)
    print(f"{'':<16}{'seconds':>9}{'peak GB':>9}{'loss':>10}   ours is")
    for way in WAYS:
        gain = ""
        if way.endswith("products"):
            gain = f"{median_ratio(seconds['ours'], seconds[way]):.2f}x these"
        elif way != "ours":
            faster = median_ratio(seconds[way], seconds["ours"])
            gain = f"{faster:.2f}x faster, {peak[way] / max(peak['ours'], 1e-9):.1f}x smaller"
        figures = f"{statistics.median(seconds[way]):>9.2f}{peak[way]:>9.2f}"
        print(f"{way:<16}{figures}{results[way][0]['loss']:>10.5f}   {gain}")


def cpu_parser(doc: str) -> argparse.ArgumentParser:
    """The options of the benchmarks of a step on a CPU."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="GSM8K's train.jsonl")
    parser.add_argument("--tokenizer", help="the folder of Qwen2.5's tokenizer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="tiny, on random tokens: the script")
    return parser


def need_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if not args.dry and not (args.data and args.tokenizer):
        parser.error("--data and --tokenizer are needed (--dry does without)")


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = cpu_parser(__doc__ or "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    need_data(parser, args)
    if args.way:
        child(args)
        return 0
    commands = {}
    for way in WAYS:
        commands[way] = [sys.executable, "-m", "bench.kd_step", *argv, "--way", way]
    facts, results = in_turn(commands, args.repeats)
    print(
        f"{facts['rows']} loss rows of {facts['tokens']} tokens, {facts['vocab']:,} ids, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    report(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
