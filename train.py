"""Train a small reasoning language model: `torchrun train.py --mode kd`, `python train.py --mode sft`.

A mode is a source of batches plus a loss; everything else is shared. Read `train()` first: it is the whole loop.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import config as configuration
from data.batch import WEIGHTINGS, constant_length
from data.dataset import Dataset, Formatter, Order, Stream
from data.tasks import TASKS
from data.tokenizer import Tokenizer, build_tiny, shared_vocabulary
from errors import RunFailed, UserError
from eval.heldout import evaluate
from eval.log import Log, peak_flops, show_batch, step_flops
from eval.report import draw_curves, summary
from kernels import backend
from kernels.attention import PackedAttention
from knobs import Config, check, kept
from losses.grpo import KL_ESTIMATES, VARIANTS, grpo_loss
from losses.kd import kd_loss
from losses.sft import sft_loss
from model import parallel
from model.checkpoint import build_model, locate, read_config, stop_ids_of
from model.generate import generate
from model.optim import build_optimizer, clip_gradients, learning_rate
from model.runs import RunFolder, StopSignal, only_one, open_run, stored_config
from rl.reward import parse_reward
from rl.rollout import Mixed, Rollouts
from rl.score import add_correction, add_logprobs

# --- set-up --------------------------------------------------------------------------------------------------------


def choose_device(cfg):
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = parallel.init(kind)
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    try:
        backend.use(cfg.kernels)
    except ValueError as e:
        raise UserError(f"--kernels={cfg.kernels}: {e}") from None
    name = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    return device, getattr(torch, name), rank, world


@functools.cache
def embedded_tokenizer():
    examples = [TASKS["word_problems"].example("word_problems", "train", f"tokenizer/{i}") for i in range(2000)]
    return build_tiny("\n".join(m["role"] + "\n" + m["content"] for m in e.messages) for e in examples)


TEACHER = dict(mode="sft", model="tiny-teacher", data="word_problems", steps=700, lr=3e-3, batch_size=64, eval_every=0, save_every=200, keep=1)
STUDENT = dict(mode="kd")


def embedded(cfg, rank, what, recipe):
    """The folder of the embedded task's teacher or distilled student, trained on first use by this same loop, kept and shared by all runs."""
    whole = Config(**configuration.defaults(Config, recipe["mode"]) | recipe)
    knobs = {k: v for k, v in configuration.resolved(whole).items() if k not in PASSING}
    sources = [(Path(__file__).parent / f).read_bytes() for f in ("data/tasks.py", "data/tokenizer.py", "model/transformer.py")]
    path = Path(cfg.runs) / f"{what}-{hashlib.sha256(json.dumps(knobs).encode() + b''.join(sources)).hexdigest()[:8]}"
    if found := parallel.broadcast(finished_run(cfg.runs, knobs, whole.steps) if rank == 0 else None):
        return found
    with only_one(path.with_suffix(".lock"), rank):  # the runs of a sweep may all be the first
        if whole.steps not in parallel.broadcast(RunFolder(path).steps()):
            if rank == 0:
                print(f"training the embedded {what} first (once; kept in {path})", flush=True)
            begun = parallel.broadcast((path / "config.json").exists())
            launch(dataclasses.replace(whole, name=path.name, runs=cfg.runs, resume=begun, device=cfg.device))
    if whole.steps not in parallel.broadcast(RunFolder(path).steps()):
        raise RunFailed(f"stopped before the embedded {what} was ready; the same command goes on with it")
    return RunFolder(path).step_folder(whole.steps)


def finished_run(runs, knobs, steps):
    """The last checkpoint of a run that did just this, with this tokenizer: `make grpo` goes on from what `make kd` left. Or None."""
    for path in sorted(Path(runs).glob("*/config.json")):
        try:
            stored = {k: v for k, v in json.loads(path.read_text()).items() if k not in PASSING}
            last = RunFolder(path.parent).step_folder(steps)
            if stored == knobs and (last / "tokenizer.json").read_bytes() == embedded_tokenizer().files["tokenizer.json"]:
                return last
        except (OSError, ValueError, AttributeError):
            continue  # another run's folder, or one being written
    return None


PASSING = ("name", "runs", "resume", "device", "kernels", "keep", "log_every", "wandb")  # knobs that do not change what a run learns


def choose_tokenizer(cfg, folder, teacher_folder):
    if cfg.tokenizer:
        return Tokenizer.load(cfg.tokenizer)
    if folder or teacher_folder:
        return Tokenizer.load(folder or teacher_folder)
    return embedded_tokenizer()


def loss_vocabulary(cfg, tokenizer, shape, teacher_tokenizer, teacher_shape):
    """How many head rows take part in the loss: the full head for SFT, the tokenizer's ids for a policy, the shared prefix for a pair."""
    if tokenizer.size > shape.vocab_size:
        raise UserError(f"{tokenizer.where} has {tokenizer.size:,} ids but the model only {shape.vocab_size:,}; name another --tokenizer")
    if teacher_shape is None:
        return tokenizer.size if cfg.mode == "grpo" else shape.vocab_size
    shared = shared_vocabulary(tokenizer, teacher_tokenizer) if teacher_tokenizer else tokenizer.size
    return min(shared, shape.vocab_size, teacher_shape.vocab_size)


# --- the mode: a source plus a loss --------------------------------------------------------------------------------


def build(cfg, run):
    """The only branch on the mode. source yields Batches; loss_fn(hidden_TD, head_VD, frozen, batch) -> (sum, metrics)."""
    if cfg.mode == "grpo":
        return rewarded_rollouts(cfg, run), functools.partial(
            grpo_loss, variant=cfg.grpo_variant, clip_low=cfg.grpo_clip_low, clip_high=cfg.grpo_clip_high, kl=cfg.grpo_kl,
            beta=cfg.grpo_beta if cfg.grpo_kl_in == "loss" else 0.0, entropy=cfg.grpo_entropy, temperature=cfg.sample_temperature,
            vocab=run.vocab, kd=cfg.grpo_kd, divergence=cfg.kd_divergence, kd_beta=cfg.kd_beta,
        )  # fmt: skip
    data = Stream(run.dataset, cfg.batch_size, cfg.seed, WEIGHTINGS[cfg.weighting], run.rank, run.world)
    if cfg.mode == "sft":
        return data, sft_loss
    if cfg.kd_signal == "sampled":
        return teacher_advantages(cfg, run), functools.partial(
            grpo_loss, variant="token", clip_low=0.2, clip_high=0.2, temperature=cfg.sample_temperature, vocab=run.vocab
        )
    loss_fn = functools.partial(
        kd_loss, divergence=cfg.kd_divergence, beta=cfg.kd_beta, temperature=cfg.kd_temperature, t_squared=cfg.kd_t_squared,
        ce=cfg.kd_ce, topk=cfg.kd_topk if cfg.kd_signal == "topk" else 0, vocab=run.vocab,
    )  # fmt: skip
    if cfg.kd_prefix == "data":
        return data, loss_fn
    written = rollouts(cfg, run, run.model if cfg.kd_prefix == "student" else run.teacher)
    return Mixed(data, written, cfg.kd_mix, cfg.seed) if cfg.kd_mix < 1 else written, loss_fn


def rollouts(cfg, run, author, judge=None, score=None, weighting=None, samples=1, **more):
    """Batches of what `author` (a model) writes on the dataset's prompts."""
    formatter, order = run.dataset.formatter, Order(len(run.dataset), cfg.seed + (cfg.kd_mix < 1))  # beside the data, not along with it

    def prompt_at(position):
        example = run.dataset.example(order(position))
        return example, formatter.prompt(example)

    write = lambda prompts, seeds: generate(
        author, prompts, cfg.sample_tokens, run.stop_ids, vocab=run.vocab, temperature=cfg.sample_temperature,
        top_k=cfg.sample_top_k, top_p=cfg.sample_top_p, seeds=seeds, batch_size=cfg.sample_batch,
    )  # fmt: skip
    return Rollouts(
        prompt_at, write, judge, score, per_batch=cfg.batch_size // samples, samples=samples, seed=cfg.seed,
        weighting=weighting or WEIGHTINGS[cfg.weighting], logged=cfg.sample_log, rank=run.rank, world=run.world, **more,
    )  # fmt: skip


def rewarded_rollouts(cfg, run):
    """The source of `grpo`: groups of samples with rewards, and the frozen log-probs that their loss reads."""

    def judge(example, completion):
        text = run.tokenizer.decode(completion.tokens, skip_special=True)
        return *run.reward(example, text, len(completion.tokens), completion.stopped), text

    def score(documents):
        if cfg.grpo_updates * cfg.grpo_epochs > 1 or cfg.grpo_correction != "none" or cfg.grpo_beta and cfg.grpo_kl_in == "reward":
            log_probs(cfg, run, documents, "old_logp", run.model)
        if run.reference:
            log_probs(cfg, run, documents, "ref_logp", run.reference)
        if cfg.grpo_correction != "none":
            add_correction(documents, cfg.grpo_correction, cfg.grpo_cap, by_sequence=VARIANTS[cfg.grpo_variant][2])

    def price(document):
        gap = torch.from_numpy(document.fields["old_logp"] - document.fields["ref_logp"])
        return cfg.grpo_beta * float(KL_ESTIMATES[cfg.grpo_kl](gap).sum())

    weighting = functools.partial(constant_length, length=cfg.sample_tokens)
    return rollouts(
        cfg, run, run.model, judge, score, WEIGHTINGS.get(VARIANTS[cfg.grpo_variant][1], weighting), cfg.grpo_samples,
        baseline=cfg.grpo_baseline, updates=cfg.grpo_updates, epochs=cfg.grpo_epochs, refills=cfg.grpo_refills,
        mask_truncated=cfg.grpo_truncated == "mask", price=price if cfg.grpo_beta and cfg.grpo_kl_in == "reward" else None,
    )  # fmt: skip


def teacher_advantages(cfg, run):
    """Samples whose advantage is log p_teacher − log p_student of each token: on average the gradient of the reverse KL."""

    def score(documents):
        log_probs(cfg, run, documents, "old_logp", run.model)
        log_probs(cfg, run, documents, "teacher_logp", run.teacher)
        for d in documents:
            d.fields["advantage"] = d.fields.pop("teacher_logp") - d.fields["old_logp"]

    return rollouts(cfg, run, run.model, score=score)


def log_probs(cfg, run, documents, name, model):
    add_logprobs(documents, name, model, temperature=cfg.sample_temperature, vocab=run.vocab, micro_tokens=cfg.micro_tokens, device=run.device)


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
    model: torch.nn.Module
    teacher: torch.nn.Module | None
    teacher_folder: Path | None
    reference: torch.nn.Module | None
    reward: Callable | None
    optimizer: torch.optim.Optimizer
    start: int | None = None  # None: from the beginning; else the step of the checkpoint that is continued
    source: Iterator = None
    loss_fn: Callable = None
    counters: dict = dataclasses.field(default_factory=lambda: {"tokens": 0, "skipped": 0, "skipped_in_a_row": 0})


def set_up(cfg, held):
    """Everything that can be wrong is found here, before a weight is read. Returns a Run, its folder locked until `held`
    (an ExitStack) is closed, or None after --show_batch."""
    check(cfg)
    device, compute_dtype, rank, world = choose_device(cfg)
    has_teacher, distilled = cfg.mode == "kd" or cfg.grpo_kd > 0, cfg.mode == "grpo" and cfg.model == "tiny"
    own_teacher, teacher_name = has_teacher and not cfg.teacher, cfg.teacher or "tiny-teacher"
    if own_teacher and cfg.model not in ("tiny", "tiny-teacher"):
        raise UserError("--teacher is needed: the embedded one only fits the embedded student (--model tiny)")
    student_folder, teacher_folder = locate(cfg.model, "--model"), locate(teacher_name, "--teacher") if has_teacher else None
    origin = locate(cfg.reference, "--reference") if cfg.reference else None
    shape = read_config(cfg.model, student_folder)
    teacher_shape = read_config(teacher_name, teacher_folder) if has_teacher else None
    tokenizer = choose_tokenizer(cfg, student_folder, teacher_folder)
    teacher_tokenizer = embedded_tokenizer() if own_teacher else teacher_folder and Tokenizer.load(teacher_folder)
    vocab = loss_vocabulary(cfg, tokenizer, shape, teacher_tokenizer, teacher_shape)
    dataset = Dataset(
        cfg.data, Formatter(tokenizer, cfg.template, cfg.system_prompt, cfg.prompt_suffix), seed=cfg.seed, max_tokens=cfg.micro_tokens,
        vocab=vocab, eval_examples=cfg.eval_examples, train_examples=cfg.train_examples, overlong=cfg.overlong, progress=rank == 0,
    )  # fmt: skip
    reward = parse_reward(cfg.grpo_reward, cfg.sample_tokens, cfg.grpo_overlong, cfg.grpo_truncated_cost) if cfg.mode == "grpo" else None
    if reward:
        dataset.need_answers(unless=reward.function)
    if cfg.mode == "grpo" or cfg.mode == "kd" and cfg.kd_prefix != "data":
        dataset.need_room(cfg.sample_tokens)
    origin = locate(cfg.reference, "--reference") if cfg.reference else student_folder
    reference_shape = read_config(cfg.reference or cfg.model, origin) if cfg.mode == "grpo" and cfg.grpo_beta else None
    if reference_shape and loss_vocabulary(cfg, tokenizer, shape, Tokenizer.load(origin) if origin else None, reference_shape) < vocab:
        raise UserError(f"--reference {cfg.reference} knows fewer of the tokenizer's {vocab:,} ids; it must share the policy's vocabulary")
    if cfg.show_batch:
        batch = next(Stream(dataset, cfg.batch_size, cfg.seed, WEIGHTINGS[cfg.weighting], rank, world))
        return show_batch(batch, tokenizer, cfg.show_batch) if rank == 0 else None
    prompts, passes = (cfg.batch_size // cfg.grpo_samples, cfg.grpo_epochs) if cfg.mode == "grpo" else (cfg.batch_size, 1)
    steps = cfg.steps or math.ceil(cfg.epochs * len(dataset) / prompts) * passes
    if steps == 0:
        raise UserError("--steps 0 takes the number of steps from --epochs, but an endless task has no epochs; set --train_examples")
    knobs = configuration.resolved(cfg, without=("name", "resume"))
    folder, start = held.enter_context(open_run(cfg.runs, cfg.name, cfg.mode, cfg.resume, cfg.keep, knobs, rank))
    student_folder = embedded(cfg, rank, "student", STUDENT) if distilled else student_folder
    teacher_folder = embedded(cfg, rank, "teacher", TEACHER) if own_teacher else teacher_folder

    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    weights = student_folder if start is None else folder.step_folder(start)
    model = build_model(shape, weights, device=device, seed=cfg.seed, weight_dtype=wide, compute_dtype=compute_dtype)
    model.checkpointing = cfg.checkpointing
    frozen = lambda shape, weights: build_model(shape, weights, device=device, seed=cfg.seed, weight_dtype=compute_dtype).requires_grad_(False)
    teacher = frozen(teacher_shape, teacher_folder) if has_teacher else None
    origin = origin if cfg.reference else student_folder
    reference = frozen(reference_shape, origin) if reference_shape else None
    if cfg.compile:
        for block in (block for m in (model, teacher, reference) if m for block in m.layers):
            block.compile_halves()
    optimizer = build_optimizer(model, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
    stop_ids = list(dict.fromkeys([*tokenizer.stop_ids(), *stop_ids_of(student_folder)]))
    run = Run(device, rank, world, folder, tokenizer, dataset, stop_ids, vocab, steps, model, teacher, teacher_folder, reference, reward, optimizer, start)
    run.source, run.loss_fn = build(cfg, run)
    if start is not None:
        saved = folder.load(start, model, optimizer)
        run.source.load(saved["source"][rank if rank < len(saved["source"]) else 0])
        run.counters = saved["counters"]
    return run


def launch(cfg):
    """Set up and train; however that ends, the run's folder is free again and SIGTERM does what it did before."""
    with contextlib.ExitStack() as held:
        if run := set_up(cfg, held):
            train(cfg, run, held.enter_context(StopSignal()))


def train(cfg, run, stop):
    """One run to its last checkpoint; the same loop for every mode."""
    log = Log(run.folder.path, configuration.resolved(cfg, without=("name", "resume")), run.start, run.rank)
    start, steps, counters = run.start or 0, run.steps, run.counters
    log.say(f"{cfg.mode}: {sum(p.numel() for p in run.model.parameters()):,} parameters on {run.world} x {run.device.type}, "
            f"{run.dataset.label}, {steps} steps -> {run.folder.path}" + (f" (resumed at step {start})" if run.start else ""))  # fmt: skip
    spent = 0.0

    for step in range(start, steps + 1):
        stopping = parallel.all_reduce_sum([stop.received], run.device)[0] > 0
        seen = step == run.start  # the checkpoint that is continued was evaluated and saved already
        if cfg.eval_examples and due(step, cfg.eval_every, steps) and not seen:
            run_on = dict(rank=run.rank, world=run.world, teacher=run.teacher, vocab=run.vocab)
            log.evaluation(step, steps, *evaluate(run.model, run.dataset, run.stop_ids, sft_loss, cfg.micro_tokens, cfg.eval_tokens, **run_on))
        if (step and due(step, cfg.save_every, steps) or stopping) and not seen:
            state = {"source": parallel.gather(run.source.state()), "counters": counters}
            if run.rank == 0:
                run.folder.save(step, run.model, run.optimizer, run.tokenizer, run.stop_ids, state)
            parallel.barrier()
        if step == steps or stopping:
            break

        clock = time.perf_counter()
        batch = next(run.source)
        (norm,) = parallel.all_reduce_sum([batch.normaliser], run.device)
        teacher = run.teacher if cfg.kd_signal != "sampled" else None  # its word is in the advantages already
        sums = forward_backward(run.model, teacher, run.loss_fn, batch, norm, cfg.micro_tokens, run.device) if norm > 0 else {}
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
            counters["skipped_in_a_row"] += norm > 0  # a rollout without anything to learn from is no failure
        run.optimizer.zero_grad()

        log.samples(step + 1, batch.samples)
        values = step_metrics(run, batch, sums | batch.metrics, time.perf_counter() - clock) | {"train/grad_norm": grad_norm, "train/lr": lr}
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
    name = lambda k: k if "/" in k else f"train/{k}"
    values = {name(k): total / count for k, (total, count) in parallel.reduce_metrics(sums).items() if count}
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


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(configuration.usage(Config, "train.py"))
        return 0
    try:
        cfg, _ = configuration.parse(Config, argv, together=False)  # to learn which run it is
        stored = stored_config(cfg.runs, cfg.name) if cfg.resume and cfg.name else {}
        cfg, _ = configuration.parse(Config, argv, stored, kept(stored))
        launch(cfg)
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
