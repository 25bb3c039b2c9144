"""Train a small reasoning language model: `torchrun train.py --mode kd`, `python train.py --mode sft`.

A mode is a source of batches plus a loss; everything else is shared. Read `train()` first: it is the whole loop.
"""

import dataclasses
import functools
import hashlib
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import config as configuration
from config import knob
from data.batch import WEIGHTINGS, Batch
from data.dataset import Dataset, Formatter, Stream
from data.tasks import TASKS, grade
from data.tokenizer import Tokenizer, build_tiny, shared_vocabulary
from errors import RunFailed, UserError
from eval.log import Log, peak_flops, show_batch, step_flops
from eval.report import draw_curves, summary
from kernels.attention import PackedAttention
from losses.kd import DIVERGENCES, WITH_BETA, kd_loss
from losses.sft import sft_loss
from model import parallel
from model.checkpoint import build_model, locate, read_config, stop_ids_of
from model.generate import generate
from model.optim import build_optimizer, clip_gradients, learning_rate
from model.runs import RunFolder, only_one, open_run

KD = {"mode": ("kd",)}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob. The defaults are those of the embedded task (seconds on a CPU); `recipes/` hold those of real models."""

    mode: str = knob("kd", "what to train by", choices=("sft", "kd"))
    model: str = knob("tiny", "the student: a checkpoint folder, a hub id, or a preset (random weights)")
    tokenizer: str = knob("", "folder with tokenizer.json; empty: the model's, the teacher's, or the embedded one")
    name: str = knob("", "the run's folder under --runs; empty: a new unique one")
    runs: str = knob("runs", "where runs are kept")
    resume: bool = knob(False, "continue the run --name from its newest checkpoint")
    seed: int = knob(0, "of the data order and of random weights")
    device: str = knob("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = knob("auto", "of activations; auto: bfloat16 on a GPU, float32 on a CPU", choices=("auto", "float32", "bfloat16", "float64"))

    data: str = knob("word_problems:800", "a task (endless, or its first 800 problems), a .jsonl/.json/.parquet file, a folder, or org/name/file of a hub dataset")
    train_examples: int = knob(0, "train on this many examples only; 0: all")
    template: str = knob("auto", "how examples become text; auto: chat if the tokenizer has a template", choices=("auto", "chat", "plain"))
    system_prompt: str = knob("", "put before a conversation that has none (some templates bring their own)")
    prompt_suffix: str = knob("", "put behind the question")
    overlong: str = knob("error", "what to do with an example longer than --micro_tokens", choices=("error", "drop"))
    show_batch: int = knob(0, "print this many examples of the first batch, what is trained on marked, and stop")

    steps: int = knob(1000, "optimizer steps; 0: as many as --epochs asks for")
    epochs: float = knob(1.0, "passes over the data", only={"steps": (0,)})
    batch_size: int = knob(32, "examples per step, over all ranks")
    micro_tokens: int = knob(8192, "tokens per forward pass; the longest example allowed")
    weighting: str = knob("token", "every token counts the same, or every sequence", choices=WEIGHTINGS)
    lr: float = knob(5e-3, "peak learning rate")
    warmup: int = knob(20, "steps of linear warm-up")
    schedule: str = knob("cosine", "after the warm-up", choices=("constant", "linear", "cosine"))
    lr_floor: float = knob(0.1, "share of the peak rate at the last step", only={"schedule": ("linear", "cosine")})
    beta1: float = knob(0.9, "AdamW")
    beta2: float = knob(0.98, "AdamW")
    eps: float = knob(1e-8, "AdamW")
    weight_decay: float = knob(0.3, "AdamW, on matrices only: not on norms, biases, embeddings")
    clip: float = knob(1.0, "global gradient norm; 0: never clipped")
    max_skipped: int = knob(5, "stop after this many non-finite steps in a row")

    teacher: str = knob("", "a checkpoint folder, a hub id or a preset; empty: the embedded task's, trained on first use", only=KD)
    kd_divergence: str = knob("forward_kl", "from the teacher", only=KD, choices=DIVERGENCES)
    kd_beta: float = knob(0.5, "share of the teacher in the mixture (jsd, skew_forward_kl), of the student (skew_reverse_kl)",
                          only=KD | {"kd_divergence": WITH_BETA})  # fmt: skip
    kd_temperature: float = knob(2.0, "divides both models' logits", only=KD)
    kd_t_squared: bool = knob(False, "multiply the divergence by the squared temperature", only=KD)
    kd_ce: float = knob(0.0, "share of cross-entropy in the loss, 0 to 1", only=KD)

    eval_every: int = knob(250, "steps between evaluations; 0: before and after only")
    eval_examples: int = knob(400, "held-out examples, carved from the training data; 0: no evaluation")
    eval_tokens: int = knob(96, "new tokens at most per answer")
    save_every: int = knob(250, "steps between checkpoints; 0: after the last step only")
    keep: int = knob(2, "checkpoints kept")
    log_every: int = knob(50, "steps between progress lines; metrics.jsonl gets every step")
    checkpointing: bool = knob(False, "recompute activations in the backward pass: less memory, a third more time")
    compile: bool = knob(False, "torch.compile the transformer's blocks")
    wandb: str = knob("off", "Weights & Biases", choices=("off", "offline", "online"))
    wandb_project: str = knob("srlm", "its project", only={"wandb": ("offline", "online")})


# --- set-up --------------------------------------------------------------------------------------------------------


def check(cfg):
    """Refuse settings that cannot work, before anything is read."""

    def need(ok, message):
        if not ok:
            raise UserError(message)

    for name in ("batch_size", "micro_tokens", "eval_tokens", "keep", "log_every", "max_skipped"):
        need(getattr(cfg, name) > 0, f"--{name} must be at least 1")
    for name in ("steps", "warmup", "clip", "weight_decay", "eval_every", "eval_examples", "save_every", "train_examples", "show_batch"):
        need(getattr(cfg, name) >= 0, f"--{name} must not be negative")
    need(cfg.lr > 0 and math.isfinite(cfg.lr), "--lr must be a positive number")
    need(cfg.steps or 0 < cfg.epochs < math.inf, "--epochs must be positive")
    need(0 <= cfg.beta1 < 1 and 0 <= cfg.beta2 < 1 and cfg.eps > 0, "--beta1 and --beta2 must be in [0, 1), --eps positive")
    need(0 <= cfg.lr_floor <= 1, "--lr_floor must be between 0 and 1")
    need(cfg.kd_temperature > 0, "--kd_temperature must be positive")
    need(0 <= cfg.kd_ce <= 1, "--kd_ce must be between 0 and 1")
    need(0 <= cfg.kd_beta <= 1, "--kd_beta must be between 0 and 1")
    skew_is_zero = cfg.kd_divergence.startswith("skew") and cfg.kd_beta == 1
    need(not (cfg.mode == "kd" and skew_is_zero), f"--kd_beta 1 makes {cfg.kd_divergence} zero everywhere")
    need(not cfg.resume or cfg.name, "--resume needs the --name of a run")
    need(cfg.device != "cuda" or torch.cuda.is_available(), "--device cuda: this machine offers no CUDA device")


def choose_device(cfg):
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = parallel.init(kind)
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    name = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    return device, getattr(torch, name), rank, world


@functools.cache
def embedded_tokenizer():
    examples = [TASKS["word_problems"].example("word_problems", "train", f"tokenizer/{i}") for i in range(2000)]
    return build_tiny("\n".join(m["role"] + "\n" + m["content"] for m in e.messages) for e in examples)


def embedded_teacher(cfg, rank):
    """The folder of the tiny teacher, trained on first use by this same loop in `sft` mode, kept and shared by all runs."""
    recipe = dict(mode="sft", model="tiny-teacher", data="word_problems", steps=TEACHER_STEPS, lr=3e-3, batch_size=64, eval_every=0, save_every=200, keep=1)
    sources = [(Path(__file__).parent / f).read_bytes() for f in ("data/tasks.py", "data/tokenizer.py", "model/transformer.py")]
    key = hashlib.sha256(json.dumps(recipe).encode() + b"".join(sources)).hexdigest()[:8]
    path = Path(cfg.runs) / f"teacher-{key}"
    with only_one(path.with_suffix(".lock"), rank):  # the runs of a sweep may all be the first
        if TEACHER_STEPS not in parallel.broadcast(RunFolder(path).steps()):
            if rank == 0:
                print(f"training the embedded teacher first (once; kept in {path})", flush=True)
            train(Config(**recipe, name=path.name, runs=cfg.runs, resume=parallel.broadcast(path.exists()), device=cfg.device))
    if TEACHER_STEPS not in parallel.broadcast(RunFolder(path).steps()):
        raise RunFailed("stopped before the embedded teacher was ready; the same command goes on with it")
    return RunFolder(path).step_folder(TEACHER_STEPS)


TEACHER_STEPS = 700


def choose_tokenizer(cfg, folder, teacher_folder):
    if cfg.tokenizer:
        return Tokenizer.load(cfg.tokenizer)
    if folder or teacher_folder:
        return Tokenizer.load(folder or teacher_folder)
    return embedded_tokenizer()


def loss_vocabulary(tokenizer, shape, teacher_folder, teacher_shape):
    """How many head rows take part in the loss: the full head for SFT, the shared prefix of ids for a pair."""
    if tokenizer.size > shape.vocab_size:
        raise UserError(f"{tokenizer.where} has {tokenizer.size:,} ids but the model only {shape.vocab_size:,}; name another --tokenizer")
    if teacher_shape is None:
        return shape.vocab_size
    shared = shared_vocabulary(tokenizer, Tokenizer.load(teacher_folder)) if teacher_folder else tokenizer.size
    return min(shared, shape.vocab_size, teacher_shape.vocab_size)


# --- the mode: a source plus a loss --------------------------------------------------------------------------------


def build(cfg, dataset, vocab, rank, world):
    """The only branch on the mode. source yields Batches; loss_fn(hidden_TD, head_VD, frozen, batch) -> (sum, metrics)."""
    source = Stream(dataset, cfg.batch_size, cfg.seed, WEIGHTINGS[cfg.weighting], rank, world)
    if cfg.mode == "sft":
        return source, sft_loss
    loss_fn = functools.partial(
        kd_loss, divergence=cfg.kd_divergence, beta=cfg.kd_beta, temperature=cfg.kd_temperature,
        t_squared=cfg.kd_t_squared, ce=cfg.kd_ce, vocab=vocab,
    )  # fmt: skip
    return source, loss_fn


@torch.no_grad()
def score(teacher, micro, attend):
    """What the loss needs from frozen models: the teacher's hidden loss rows and its head."""
    if teacher is None:
        return None
    hidden_TC = teacher(micro.tokens_T, micro.positions_T, attend)
    return micro.select(hidden_TC), teacher.head_VD


def forward_backward(model, teacher, loss_fn, batch, norm, micro_tokens, device):
    """Gradients of the global batch's loss, micro-batch by micro-batch; returns the metrics' (sum, count) pairs."""
    sums = {}
    for micro in batch.split(micro_tokens):
        micro = micro.to(device)
        attend = PackedAttention(micro.lengths, device)
        frozen = score(teacher, micro, attend)
        loss_sum, metrics = loss_fn(model(micro.tokens_T, micro.positions_T, attend), model.head_VD, frozen, micro)
        (loss_sum / norm).backward()
        for name, (total, count) in metrics.items():
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + total.double(), old[1] + count.double())
    return sums


# --- evaluation in the loop ----------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(cfg, run):
    """Held-out loss (nats per trained token) and, where the examples have answers, greedy accuracy. Returns (metrics, samples)."""
    model, dataset, device = run.model.eval(), run.dataset, run.device
    documents = dataset.held_out_documents()[run.rank :: run.world]
    total = count = 0.0
    for micro in Batch.pack(documents).split(cfg.micro_tokens) if documents else ():
        micro = micro.to(device)
        hidden_TD = model(micro.tokens_T, micro.positions_T, PackedAttention(micro.lengths, device))
        loss_sum, _ = sft_loss(hidden_TD, model.head_VD, None, micro)
        total, count = total + float(loss_sum), count + micro.normaliser
    formatter = dataset.formatter
    examples = [e for e in dataset.held_out if e.answer is not None and e.task in TASKS][run.rank :: run.world]
    prompts = [formatter.prompt(e) for e in examples]
    answers = generate(model, prompts, cfg.eval_tokens, run.stop_ids, vocab=formatter.tokenizer.size) if prompts else []
    samples = []
    for example, ids in zip(examples, answers):
        text = formatter.tokenizer.decode(ids, skip_special=True)
        samples.append(dict(question=example.messages[-2]["content"], gold=example.answer, text=text, correct=grade(example, text),
                            tokens=len(ids), stopped=ids[-1] in run.stop_ids))  # fmt: skip
    model.train()
    correct, stopped = sum(s["correct"] for s in samples), sum(s["stopped"] for s in samples)
    total, count, correct, stopped, n = parallel.all_reduce_sum([total, count, correct, stopped, len(samples)], device)
    metrics = {"loss": total / count} if count else {}
    if n:
        metrics |= {"accuracy": correct / n, "stopped": stopped / n, "problems": int(n)}
    return {f"eval/{dataset.label}/{name}": value for name, value in metrics.items()}, samples


# --- the loop ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What `set_up` prepares and the loop uses."""

    device: torch.device
    rank: int
    world: int
    folder: RunFolder
    tokenizer: Tokenizer
    dataset: Dataset
    stop_ids: list
    vocab: int
    steps: int
    source: Stream
    loss_fn: Callable
    model: torch.nn.Module
    teacher: torch.nn.Module | None
    teacher_folder: Path | None
    optimizer: torch.optim.Optimizer
    start: int | None = None  # None: from the beginning; else the step of the checkpoint that is continued
    counters: dict = dataclasses.field(default_factory=lambda: {"tokens": 0, "skipped": 0, "skipped_in_a_row": 0})


def set_up(cfg):
    """Everything that can be wrong is found here, before a weight is read. Returns a Run, or None after --show_batch."""
    check(cfg)
    device, compute_dtype, rank, world = choose_device(cfg)
    is_kd, student_folder, teacher_folder = cfg.mode == "kd", locate(cfg.model, "--model"), None
    if is_kd and not cfg.teacher and cfg.model not in ("tiny", "tiny-teacher"):
        raise UserError("--teacher is needed: the embedded one only fits the embedded student (--model tiny)")
    if is_kd:
        teacher_folder = locate(cfg.teacher, "--teacher") if cfg.teacher else embedded_teacher(cfg, rank)
    shape = read_config(cfg.model, student_folder)
    teacher_shape = read_config(cfg.teacher, teacher_folder) if is_kd else None
    tokenizer = choose_tokenizer(cfg, student_folder, teacher_folder)
    vocab = loss_vocabulary(tokenizer, shape, teacher_folder, teacher_shape)
    dataset = Dataset(
        cfg.data, Formatter(tokenizer, cfg.template, cfg.system_prompt, cfg.prompt_suffix), seed=cfg.seed, max_tokens=cfg.micro_tokens,
        vocab=vocab, eval_examples=cfg.eval_examples, train_examples=cfg.train_examples, overlong=cfg.overlong, progress=rank == 0,
    )  # fmt: skip
    source, loss_fn = build(cfg, dataset, vocab, rank, world)
    if cfg.show_batch:
        return show_batch(next(source), tokenizer, cfg.show_batch) if rank == 0 else None
    steps = cfg.steps or math.ceil(cfg.epochs * len(dataset) / cfg.batch_size)
    if steps == 0:
        raise UserError("--steps 0 takes the number of steps from --epochs, but an endless task has no epochs; set --train_examples")
    folder, start = open_run(cfg.runs, cfg.name, cfg.mode, cfg.resume, cfg.keep, rank)

    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    weights = student_folder if start is None else folder.step_folder(start)
    model = build_model(shape, weights, device=device, seed=cfg.seed, weight_dtype=wide, compute_dtype=compute_dtype)
    model.checkpointing = cfg.checkpointing
    teacher = build_model(teacher_shape, teacher_folder, device=device, seed=cfg.seed, weight_dtype=compute_dtype) if is_kd else None
    if teacher:
        teacher.requires_grad_(False)
    if cfg.compile:
        for block in [*model.layers, *(teacher.layers if teacher else ())]:
            block.compile_halves()
    optimizer = build_optimizer(model, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
    stop_ids = list(dict.fromkeys([*tokenizer.stop_ids(), *stop_ids_of(student_folder)]))
    run = Run(device, rank, world, folder, tokenizer, dataset, stop_ids, vocab, steps, source, loss_fn, model, teacher, teacher_folder, optimizer, start)
    if start is not None:
        saved = folder.load(start, model, optimizer)
        source.load(saved["source"])
        run.counters = saved["counters"]
    return run


def train(cfg):
    """One run from set-up to the last checkpoint; the same loop for every mode."""
    run = set_up(cfg)
    if run is None:
        return
    log = Log(run.folder.path, configuration.resolved(cfg, without=("name", "resume")), run.start, run.rank)
    start, steps, counters = run.start or 0, run.steps, run.counters
    log.say(f"{cfg.mode}: {sum(p.numel() for p in run.model.parameters()):,} parameters on {run.world} x {run.device.type}, "
            f"{run.dataset.label}, {steps} steps -> {run.folder.path}" + (f" (resumed at step {start})" if run.start else ""))  # fmt: skip
    stop, spent = StopSignal(), 0.0

    for step in range(start, steps + 1):
        stopping = parallel.all_reduce_sum([stop.received], run.device)[0] > 0
        seen = step == run.start  # the checkpoint that is continued was evaluated and saved already
        if cfg.eval_examples and due(step, cfg.eval_every, steps) and not seen:
            log.evaluation(step, steps, *evaluate(cfg, run))
        if (step and due(step, cfg.save_every, steps) or stopping) and not seen:
            if run.rank == 0:
                run.folder.save(step, run.model, run.optimizer, run.tokenizer, run.stop_ids, {"source": run.source.state(), "counters": counters})
            parallel.barrier()
        if step == steps or stopping:
            break

        clock = time.perf_counter()
        batch = next(run.source)
        (norm,) = parallel.all_reduce_sum([batch.normaliser], run.device)
        sums = forward_backward(run.model, run.teacher, run.loss_fn, batch, norm, cfg.micro_tokens, run.device) if norm > 0 else {}
        parallel.sync_gradients(run.model)
        grad_norm, finite = clip_gradients(run.model, cfg.clip)
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.schedule, cfg.lr_floor)
        if norm > 0 and finite:
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.step()
            counters["skipped_in_a_row"] = 0
        else:
            counters["skipped"] += 1
            counters["skipped_in_a_row"] += 1
        run.optimizer.zero_grad()

        values = step_metrics(run, batch, sums, time.perf_counter() - clock) | {"train/grad_norm": grad_norm, "train/lr": lr}
        spent += values["train/seconds"]
        log.metrics(step + 1, values)
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            log.progress(step + 1, steps, values, spent / (step + 1 - start) * (steps - step - 1))
        if counters["skipped_in_a_row"] >= cfg.max_skipped:
            raise RunFailed(f"stopped at step {step + 1}: {cfg.max_skipped} steps in a row had no finite gradient; lower --lr or look at the data")

    run.source.close()
    if stopping:
        log.say(f"stopped by a signal after step {step}; continue with --name {run.folder.path.name} --resume")
    elif run.rank == 0:
        try:
            draw_curves(run.folder.path)
        except OSError as e:
            raise RunFailed(f"{run.folder.path}/curves.png could not be written ({e.strerror}); the run itself is whole") from None
        log.say(summary(run.folder.path, run.teacher_folder))
    log.close()


def step_metrics(run, batch, sums, seconds):
    """One step's line of metrics.jsonl: losses over all ranks, speed, and on a known GPU the share of its peak."""
    flops = step_flops(batch, run.model, run.teacher, run.vocab)
    tokens, flops = parallel.all_reduce_sum([len(batch.tokens_T), flops], run.device)
    run.counters["tokens"] += int(tokens)
    values = {f"train/{k}": total / count for k, (total, count) in reduce_metrics(sums).items() if count}
    values |= {"train/tokens": run.counters["tokens"], "train/skipped": run.counters["skipped"]}
    values |= {"train/seconds": seconds, "train/tokens_per_second": tokens / seconds}
    if run.device.type == "cuda":
        values["train/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if peak := peak_flops(torch.cuda.get_device_name()):
            values["train/mfu"] = flops / seconds / peak / run.world
    return values


def due(step, every, last):
    """Before the first step, every `every` steps, and after the last."""
    return step in (0, last) or bool(every) and step % every == 0


def reduce_metrics(sums):
    """Sum the ranks' (sum, count) pairs; a rank without micro-batches has none."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    merged = {}
    for part in parallel.gather(pairs):
        for name, (total, count) in part.items():
            old = merged.get(name, (0.0, 0.0))
            merged[name] = (old[0] + total, old[1] + count)
    return merged


class StopSignal:
    """SIGTERM is noted and acted upon between steps: save, then leave."""

    def __init__(self):
        self.received = False
        signal.signal(signal.SIGTERM, self)

    def __call__(self, *_):
        self.received = True


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(configuration.usage(Config, "train.py"))
        return 0
    try:
        cfg, _ = configuration.parse(Config, argv)
        if cfg.resume and cfg.name and (stored := Path(cfg.runs) / cfg.name / "config.json").is_file():
            cfg, _ = configuration.parse(Config, argv, base=configuration.read_file(stored))
        train(cfg)
        return 0
    except UserError as e:
        code, text = 2, e
    except RunFailed as e:
        code, text = 1, e
    except KeyboardInterrupt:
        code, text = 130, "interrupted"
    print(f"train.py: {text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    parallel.close()
    sys.exit(code)
