"""One KD step at the full vocabulary on a CPU, beside what a user would write first.

    python -m bench.kd_step --data path/to/gsm8k/train.jsonl --tokenizer path/to/qwen2.5-tokenizer

Student 4 layers × hidden 256, teacher 6 × 384 (152,064 rows), the first 8 rows of GSM8K's train.jsonl, forward KL, fp32,
2 threads. Three ways, each in its own process, interleaved, the median of `--repeats` steps:
  ours            the loop's own forward_backward, chunked head
  padded logits   plain PyTorch: [B, L, V] logits of both models, masked afterwards
  selected rows   plain PyTorch: the loss rows are selected before the head, [N, V] logits of both models
Also timed in the same run: the four matrix products that no exact method avoids (student logits, teacher logits, both
gradients), at the same shapes. A step is forward, backward, clipping and AdamW. Memory is the process's peak above its
resident size before the first step, so model weights count for nobody.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
WAYS = ("ours", "padded logits", "selected rows", "products")


def load(data, tokenizer_folder):
    """(batch, shared vocabulary) of the first 8 rows."""
    from data.batch import Batch
    from data.formats import read_rows, to_example
    from data.formatter import Formatter
    from data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_folder)
    rows = [pair for _, pair in zip(range(8), read_rows(Path(data)))]
    return Batch.pack(
        Formatter(tokenizer).documents([to_example(row, origin) for origin, row in rows])
    ), tokenizer.size


def padded(batch):
    """[B, L] tokens, positions, targets and weights, as a user without packing has them."""
    split = lambda x: torch.nn.utils.rnn.pad_sequence(x.split(batch.lengths), batch_first=True)
    return [split(x) for x in (batch.tokens_T, batch.target_T, batch.weight_T.float())]


def hidden_states(model, tokens_BL):
    """Right-padded rows as documents of equal length: what padded training computes."""
    from kernels.attention import PackedAttention

    size, length = tokens_BL.shape
    positions = torch.arange(length).repeat(size)
    return model(tokens_BL.flatten(), positions, PackedAttention([length] * size))


def plain_loss(student, teacher, batch, vocab, select):
    tokens_BL, target_BL, weight_BL = padded(batch)
    hidden, weight = hidden_states(student, tokens_BL), weight_BL.flatten()
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


def our_step(student, teacher, batch, vocab):
    import functools

    from data.batch import GlobalBatch
    from losses.kd import KDConfig, kd_loss
    from train import forward_backward

    loss_fn = functools.partial(kd_loss, cfg=KDConfig("forward_kl", vocab=vocab))
    sums = forward_backward(
        student,
        teacher,
        loss_fn,
        GlobalBatch(batch.documents),
        batch.normalizer,
        8192,
        torch.device("cpu"),
    )
    return float(sums["loss"][0] / sums["loss"][1])


def products(student, teacher, batch, vocab):
    """Seconds of the four matrix products over the loss rows, in the chunks of `linear_kl`, with buffers allocated once."""
    from kernels.chunk import default_chunk_rows

    chunk = default_chunk_rows(vocab, torch.device("cpu")) // 2
    n, d, c = len(batch.rows_N), student.config.hidden_size, teacher.config.hidden_size
    hidden, head = torch.randn(n, d), student.head_VD.detach()[:vocab]
    teacher_hidden, teacher_head = torch.randn(n, c), teacher.head_VD.detach()[:vocab]
    z, grad_head, grad_hidden = torch.empty(chunk, vocab), torch.zeros(vocab, d), torch.empty(n, d)
    began = time.perf_counter()
    for lo in range(0, n, chunk):
        x = hidden[lo : lo + chunk]
        torch.mm(teacher_hidden[lo : lo + chunk], teacher_head.t(), out=z[: len(x)])
        logits = torch.mm(x, head.t(), out=z[: len(x)])
        torch.mm(logits, head, out=grad_hidden[lo : lo + chunk])
        torch.addmm(grad_head, logits.t(), x, out=grad_head)
    return time.perf_counter() - began


def resident(peak=False):
    key = "VmHWM" if peak else "VmRSS"
    return (
        int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1])
        / 1e6
    )


def child(way, args):
    """Serve one step per line of standard input; print a JSON line after each."""
    sys.path.insert(0, str(ROOT))
    from model.checkpoint import build_model
    from model.optim import build_optimizer, clip_gradients
    from model.transformer import PRESETS

    torch.set_num_threads(args.threads)
    batch, vocab = load(args.data, args.tokenizer)
    student = build_model(PRESETS["small"], None, device="cpu", seed=0)
    teacher = build_model(PRESETS["small-teacher"], None, device="cpu", seed=1).requires_grad_(
        False
    )
    optimizer = build_optimizer(student, 1e-4, (0.9, 0.95), 1e-8, 0.0)
    before = resident()
    print(
        json.dumps({"rows": len(batch.rows_N), "tokens": len(batch.tokens_T), "vocab": vocab}),
        flush=True,
    )
    for _ in sys.stdin:
        began = time.perf_counter()
        if way == "products":
            loss, seconds = 0.0, products(student, teacher, batch, vocab)
        else:
            if way == "ours":
                loss = our_step(student, teacher, batch, vocab)
            else:
                total = plain_loss(student, teacher, batch, vocab, select=way == "selected rows")
                total.backward()
                loss = total.item()
                del total
            clip_gradients(student, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
        print(
            json.dumps({"seconds": seconds, "gb": resident(peak=True) - before, "loss": loss}),
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--way", choices=WAYS)
    args = parser.parse_args()
    if args.way:
        return child(args.way, args)
    workers = {}
    for way in WAYS:
        command = [sys.executable, "-m", "bench.kd_step", *sys.argv[1:], "--way", way]
        workers[way] = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
    facts = [json.loads(w.stdout.readline()) for w in workers.values()][0]
    print(
        f"{facts['rows']} loss rows of {facts['tokens']} tokens, {facts['vocab']:,} ids, {args.threads} threads, torch {torch.__version__}"
    )
    results = {way: [] for way in WAYS}
    for repeat in range(args.repeats + 1):  # the first round warms up
        for way, worker in workers.items():
            worker.stdin.write("go\n")
            worker.stdin.flush()
            results[way].append(json.loads(worker.stdout.readline()))
        print(f"\rround {repeat}/{args.repeats}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    time_of = lambda way: [r["seconds"] for r in results[way][1:]]
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(time_of(a), time_of(b)))
    peak = {way: max(r["gb"] for r in results[way]) for way in WAYS}
    print(f"{'':<16}{'seconds':>9}{'peak GB':>9}{'loss':>10}   ours is")
    for way in WAYS:
        gain = (
            ""
            if way == "ours"
            else f"{ratio(way, 'ours'):.2f}x faster, {peak[way] / peak['ours']:.1f}x smaller"
        )
        if way == "products":
            gain = f"{ratio('ours', way):.2f}x these"
        print(
            f"{way:<16}{statistics.median(time_of(way)):>9.2f}{peak[way]:>9.2f}{results[way][0]['loss']:>10.5f}   {gain}"
        )


if __name__ == "__main__":
    main()
