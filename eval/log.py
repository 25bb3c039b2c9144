"""What a run leaves behind while it goes: metrics.jsonl, samples.jsonl, wandb, the progress line. Silent but on rank 0."""

import functools
import itertools
import json
import os
import secrets
import sys

from errors import RunFailed, say
from eval.report import environment
from files import replace_file
from model import parallel


class Log:
    """Written on rank 0 only. config: the resolved knobs, kept as config.json. resume_step: later lines are cut off (None: all).
    error: the RunFailed of the first line that could not be written, on rank 0, or None: the loop tells all ranks of it at its next step."""

    def __init__(self, folder, config, resume_step, rank):
        self.folder, self.rank, self.wandb, self.error = folder, rank, None, None
        parallel.on_rank_0(rank, functools.partial(self._open, folder, config, resume_step))

    def _open(self, folder, config, resume_step):
        for name in ("metrics.jsonl", "samples.jsonl"):
            cut_back(folder / name, -1 if resume_step is None else resume_step)
        replace_file(folder / "config.json", json.dumps(config, indent=2) + "\n")
        replace_file(folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
        if config["wandb"] != "off":
            import wandb

            id_file = folder / "wandb_id"
            run_id = (
                id_file.read_text()
                if id_file.exists()
                else os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
            )
            replace_file(id_file, run_id)
            try:
                self.wandb = wandb.init(
                    project=config["wandb_project"],
                    name=folder.name,
                    id=run_id,
                    resume="allow",
                    mode=config["wandb"],
                    dir=str(folder),
                    config=config,
                )
            except Exception as e:  # not logged in, no network: wandb raises many kinds
                raise RunFailed(
                    f"wandb did not start ({str(e).splitlines()[0]}); use --wandb offline or off"
                ) from None

    def metrics(self, step, values):
        if self.rank:
            return
        self._append("metrics.jsonl", json.dumps({"step": step} | values) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def samples(self, step, samples):
        lines = "".join(json.dumps({"step": step} | s, ensure_ascii=False) + "\n" for s in samples)
        if not self.rank and lines:
            self._append("samples.jsonl", lines)

    def _append(self, name, text):
        try:
            append(self.folder / name, text)
        except RunFailed as e:
            self.error = self.error or e

    def evaluation(self, step, steps, metrics, samples):
        self.metrics(step, metrics)
        self.samples(step, samples)
        self.say(
            f"step {step}/{steps}  "
            + "  ".join(
                f"{k.split('/')[-1]} {v:.4g}" for k, v in metrics.items() if k.count("/") == 2
            )
        )

    def say(self, text):
        if not self.rank:
            say(text)

    def progress(self, step, steps, values, left):
        shown = {"loss": float("nan")} | {k.removeprefix("train/"): v for k, v in values.items()}
        parts = [
            f"step {step:>{len(str(steps))}}/{steps}",
            f"loss {shown['loss']:.4f}",
            f"|g| {shown['grad_norm']:.2f}",
        ]
        parts += [f"reward {shown['rollout/reward']:.3f}"] if "rollout/reward" in shown else []
        parts += [f"lr {shown['lr']:.1e}", f"{shown['tokens_per_second']:,.0f} tok/s"]
        parts += [f"mfu {shown['mfu']:.1%}"] if "mfu" in shown else []
        parts += [f"skipped {shown['skipped']}"] if shown["skipped"] else []
        parts += [f"no gradient {shown['no_gradient']}"] if shown["no_gradient"] else []
        self.say("  ".join([*parts, f"{duration(left)} left"]))

    def close(self):
        if self.wandb:
            self.wandb.finish()


def duration(seconds):
    """As in 0m32s, 59m59s, 2h00m00s. Rounded first: 59.7 seconds are a minute."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m{seconds:02}s" if hours else f"{minutes}m{seconds:02}s"


def append(path, text):
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise RunFailed(f"{path} could not be written ({e.strerror})") from None


def cut_back(path, step):
    """Drop the lines of later steps, and a line that was cut off while written."""
    if path.exists():
        kept = []
        for line in path.read_text(encoding="utf-8", errors="replace").split(
            "\n"
        ):  # texts hold other line separators raw
            try:
                if json.loads(line)["step"] > step:
                    break
            except (ValueError, KeyError, TypeError):
                break
            kept.append(line + "\n")
        replace_file(path, "".join(kept))


# Dense bf16 FLOP/s summed in fp32, from NVIDIA's data sheets and architecture papers (half of what they
# state with sparsity), by the device's whole name without "NVIDIA ": cards of one chip differ by a factor
# of two (H100 SXM and PCIe, A10 and A10G, desktop and laptop). What is not listed has no known peak.
PEAK_FLOPS = {
    "H100 80GB HBM3": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "GH200 480GB": 989e12,
    "GH200 144G HBM3e": 989e12,
    "H800": 989e12,
    "H800 PCIe": 756e12,
    "H20": 148e12,
    "B200": 2250e12,
    "GB200": 2500e12,
    "A100-SXM4-40GB": 312e12,
    "A100-SXM4-80GB": 312e12,
    "A100-PCIE-40GB": 312e12,
    "A100-PCIE-80GB": 312e12,
    "A100 80GB PCIe": 312e12,
    "A800-SXM4-40GB": 312e12,
    "A800-SXM4-80GB": 312e12,
    "A800 80GB PCIe": 312e12,
    "A10": 125e12,
    "A10G": 70e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "RTX A6000": 154.8e12,
    "L4": 121e12,
    "L20": 119.5e12,
    "L40": 181e12,
    "L40S": 362e12,
    "RTX 6000 Ada Generation": 364e12,
    "GeForce RTX 5090": 209.5e12,
    "GeForce RTX 4090": 165.2e12,
    "GeForce RTX 3090": 71e12,
}


def peak_flops(name):
    """Dense bf16 FLOP/s of the GPU of exactly this name, or None."""
    return PEAK_FLOPS.get(name.removeprefix("NVIDIA "))


def forward_flops(model, lengths, rows, vocab):
    """FLOPs of a forward pass over documents of these lengths, the head on `rows` of their tokens only."""
    context = sum(n * n for n in lengths) / max(1, 2 * sum(lengths))
    return (
        sum(lengths) * model.flops_per_token(context) + 2 * rows * model.config.hidden_size * vocab
    )


def generation_flops(model, prompts, new, vocab):
    """FLOPs of writing new[i] tokens behind prompts[i]: the last one is never read, and a prompt like the one before it shares that one's cache."""
    shared = [len(p) - 1 for before, p in itertools.pairwise(prompts) if p == before]
    read = [len(p) + n - 1 for p, n in zip(prompts, new, strict=True)]
    return forward_flops(model, read, sum(new), vocab) - forward_flops(model, shared, 0, vocab)


def step_flops(batch, model, teacher, vocab, head_passes=0):
    """FLOPs of one step's share: body over all tokens, head over the loss rows only, backward twice the forward but for the gradients of
    frozen matrices. head_passes: how often the head runs over the loss rows before, without gradients (GSPO's sequence ratios: once)."""
    tokens, rows = len(batch.tokens_T), len(batch.rows_N)
    forward = lambda m: forward_flops(m, batch.lengths, rows, vocab)
    spared = (
        2
        * tokens
        * sum(p.numel() for p in model.layers.parameters() if p.dim() == 2 and not p.requires_grad)
    )
    head = 2 * rows * model.config.hidden_size * vocab
    spared += 0 if model.head_VD.requires_grad else head
    return 3 * forward(model) + head_passes * head - spared + (forward(teacher) if teacher else 0)


def show_batch(batch, tokenizer, count):
    """Print documents with what is trained on in ⟦brackets⟧ (green on a terminal)."""
    on, off = ("\033[32m⟦", "⟧\033[0m") if sys.stdout.isatty() else ("⟦", "⟧")
    for n, d in enumerate(batch.documents[:count], 1):
        trained = int((d.weights != 0).sum())
        print(f"--- example {n}: {len(d)} tokens, {trained} trained on")
        lo = 0
        for hi in range(1, len(d) + 1):
            if hi == len(d) or (d.weights[hi] != 0) != (d.weights[lo] != 0):
                text = tokenizer.decode(d.tokens[lo:hi])
                print(on + text + off if d.weights[lo] != 0 else text, end="")
                lo = hi
        print()
