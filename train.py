"""Train a small reasoning language model, as in `torchrun train.py --mode kd`.

A mode is a source of batches plus a loss; everything else is shared. `launch` at the end lists the
stages: `setup` and `load_models` (prepare.py), `build` (the only branch on the mode), and `train`,
the loop.
"""

from errors import Halted, RunFailed, UserError, as_command, say  # isort: skip

import copy
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import options
from config import OWN_TOKENS, Config, listed_ids, needs_old_logp, sampling_of
from curves import draw_curves, result_rows, summary
from data.batch import WEIGHTINGS, Batch, GlobalBatch, Metrics, constant_length
from data.dataset import Dataset, DataStream
from data.show import show_batch
from kernels.attention import PackedAttention
from kernels.cpu import keep_freed_memory
from losses.grpo import VARIANTS, GRPOConfig, grpo_loss
from losses.kd import KDConfig, kd_loss
from losses.sft import sft_loss
from model import parallel
from model.card import CARD, model_card
from model.checkpoint import save_model
from model.flops import forward_flops, head_flops, peak_flops, step_flops
from model.optim import clip_gradients, learning_rate, sizes_of, update_average
from model.sharding import generates_in_shards, local
from model.transformer import Transformer
from overview import check_memory, overview, show_first
from plugins import named_digests, where_raised
from prepare import COSTS, Run, load_models, number_of_steps, rehearse, setup
from progress import Halt, Progress, go_on
from rl.logprobs import teacher_rows
from rl.rollout import GRPORollouts, MixedSource, Rollouts, SampledKDRollouts, Source
from rl.sample import RolloutConfig
from run import (
    Clock,
    RunFolder,
    RunLogger,
    StopSignal,
    due,
    has_output,
    open_run,
    read_metrics,
    refuse_fewer,
    resume_command,
    still_due,
    stored_config,
)
from tracking import report_failure
from validation import Validation

# --- the mode: a source plus a loss --------------------------------------------------------------


def build(cfg: Config, run: Run) -> tuple[Source, Callable]:
    """Choose (source of batches, loss function) by the mode.

    A source is an endless iterator of GlobalBatches with `state` and `load` (for --resume),
    `take_cost` (tokens and FLOPs spent on batches since it was last asked) and `close`. A loss
    function takes (hidden_TD, head_VD, the teacher's hidden rows and head or None, batch) and
    returns (sum, {metric: (sum, count)}).
    """
    return {"sft": build_sft, "kd": build_kd, "grpo": build_grpo}[cfg.mode](cfg, run)


def build_sft(cfg: Config, run: Run) -> tuple[Source, Callable]:
    return data_stream(cfg, run.dataset, run.rank, run.world, run.stop.halt), sft_loss


def build_kd(cfg: Config, run: Run) -> tuple[Source, Callable]:
    if cfg.kd_signal in OWN_TOKENS:
        config = rollout_config(cfg, run)
        rollouts = SampledKDRollouts(run.dataset, run.policy, config, run.teachers)
        policy_gradient = GRPOConfig(
            variant="token",  # its surrogate alone counts here: the weighting is --weighting
            clip_low=0.2,
            clip_high=0.2,
            temperature=cfg.sample_temperature,
            vocab=run.vocab_size,
        )
        return rollouts, functools.partial(grpo_loss, cfg=policy_gradient)
    distillation = KDConfig(
        divergence=cfg.kd_divergence,
        beta=cfg.kd_beta,
        temperature=cfg.kd_temperature,
        t_squared=cfg.kd_t_squared,
        ce=cfg.kd_ce,
        vocab=run.vocab_size,
        signal=cfg.kd_signal,
        k=listed_ids(cfg),
        seed=cfg.seed,
        weight_by=cfg.kd_weight_by,
        clip=cfg.kd_clip,
    )
    loss_fn = functools.partial(kd_loss, cfg=distillation)
    data = data_stream(cfg, run.dataset, run.rank, run.world, run.stop.halt)
    if cfg.kd_prefix == "data":
        return data, loss_fn
    generator = run.policy if cfg.kd_prefix == "student" else run.teacher
    assert generator is not None
    if cfg.kd_mix == 1:
        return Rollouts(run.dataset, generator, rollout_config(cfg, run), run.teachers), loss_fn
    # Beside the data, prompts come in an order of their own.
    rollouts_of_run = round(cfg.kd_mix * run.steps)
    config = rollout_config(cfg, run, prompt_seed=cfg.seed + 1, rollouts=rollouts_of_run)
    rollouts = Rollouts(run.dataset, generator, config, run.teachers)
    return MixedSource(data, rollouts, cfg.kd_mix, cfg.seed), loss_fn


def build_grpo(cfg: Config, run: Run) -> tuple[Source, Callable]:
    objective = GRPOConfig(
        variant=cfg.grpo_variant,
        clip_low=cfg.grpo_clip_low,
        clip_high=cfg.grpo_clip_high,
        kl_coef=cfg.grpo_kl_coef if cfg.grpo_kl_in == "loss" else 0.0,
        kl_estimator=cfg.grpo_kl_estimator,
        entropy_coef=cfg.grpo_entropy_coef,
        temperature=cfg.sample_temperature,
        vocab=run.vocab_size,
        kd_coef=cfg.grpo_kd_coef,
        kd_divergence=cfg.kd_divergence,
        kd_beta=cfg.kd_beta,
    )
    variant = VARIANTS[cfg.grpo_variant]
    constant = functools.partial(constant_length, length=cfg.sample_tokens)
    config = rollout_config(
        cfg,
        run,
        prompts_per_batch=cfg.batch_size // cfg.grpo_samples,
        weighting=(WEIGHTINGS | {"constant": constant})[variant.weighting],
        samples_per_prompt=cfg.grpo_samples,
        advantage=cfg.grpo_advantage,
        kl_penalty_coef=cfg.grpo_kl_coef if cfg.grpo_kl_in == "reward" else 0.0,
        old_logprobs=needs_old_logp(cfg),
        tis=cfg.grpo_tis,
        tis_cap=cfg.grpo_tis_cap,
        tis_by_sequence=variant.whole_sequences or cfg.grpo_tis == "mask_sequence",
        paced=cfg.grpo_paced,
        dynamic_sampling_rounds=cfg.grpo_dynamic_sampling_rounds,
        mask_truncated=cfg.grpo_mask_truncated,
        minibatches=cfg.grpo_minibatches_per_rollout,
        ppo_epochs=cfg.grpo_ppo_epochs,
        logged_samples=cfg.sample_log,
        rollouts=run.steps // (cfg.grpo_minibatches_per_rollout * cfg.grpo_ppo_epochs),
    )
    assert run.reward is not None
    rollouts = GRPORollouts(run.dataset, run.policy, config, run.reward, run.reference)
    return rollouts, functools.partial(grpo_loss, cfg=objective)


def data_stream(
    cfg: Config, dataset: Dataset, rank: int, world: int, halt: Halt = go_on
) -> DataStream:
    """Batches of the data set, this rank's share."""
    weighting = WEIGHTINGS[cfg.weighting]
    return DataStream(dataset, cfg.batch_size, cfg.seed, weighting, rank, world, halt)


def rollout_config(cfg: Config, run: Run, **more) -> RolloutConfig:
    """What every kind of rollout reads of the options; `more` replaces or adds fields."""
    common = RolloutConfig(
        prompts_per_batch=cfg.batch_size,
        weighting=WEIGHTINGS[cfg.weighting],
        max_new_tokens=cfg.sample_tokens,
        stop_ids=run.stop_ids,
        vocab_size=run.vocab_size,
        micro_batch_tokens=cfg.micro_batch_tokens,
        temperature=cfg.sample_temperature,
        top_k=cfg.sample_top_k,
        top_p=cfg.sample_top_p,
        generation_batch=cfg.sample_batch,
        seed=cfg.seed,
        prompt_seed=cfg.seed,
        rank=run.rank,
        world=run.world,
        start_tokens=cfg.sample_tokens_start,
        rollouts=run.steps,
        taught=bool(run.teachers),
        continues=cfg.kd_prefix_tokens > 0,
        halt=run.stop.halt,
    )
    return dataclasses.replace(common, **more)


def teacher_forward(
    teachers: Sequence[Transformer], micro: Batch, attend: PackedAttention, micro_batch_tokens: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the loss needs from a teacher: its hidden loss rows [N, C] and its head [U, C]."""
    if not teachers:
        return None
    teacher = teachers[micro.teacher]
    with torch.no_grad():
        if any(document.teacher_tokens is not None for document in micro.documents):
            parts = teacher_rows(micro.documents, teacher, micro_batch_tokens)
            return torch.cat([rows for _, rows in parts]), teacher.head_VD
        hidden_TC = teacher(micro.tokens_T, micro.positions_T, attend)
        return micro.select(hidden_TC), teacher.head_VD


# --- the loop -------------------------------------------------------------------------------------

QUIET = 30.0  # seconds without a word, after which a progress line is due
LOWER = "lower --lr or look at the data"


def forward_backward(
    model: Transformer,
    teachers: Sequence[Transformer],
    loss_fn: Callable,
    batch: GlobalBatch,
    norm: float,
    micro_batch_tokens: int,
    device: torch.device,
    halt: Halt = go_on,
) -> Metrics:
    """Add the gradients of the global batch's loss, one micro-batch after another.

    Args:
        norm: What divides the sum of losses: the normalizer of the batch over all ranks.
        halt: Raises Halted, between two of them, when a signal came.

    Returns:
        This rank's metrics as (sum, count).
    """
    sums: Metrics = {}
    progress = Progress("a step", len(batch.documents), "examples", parallel.speaks(), halt)
    for micro in batch.split(micro_batch_tokens):
        micro = micro.to(device)
        attend = PackedAttention(micro.lengths, device)
        frozen = teacher_forward(teachers, micro, attend, micro_batch_tokens)
        hidden_TD = model(micro.tokens_T, micro.positions_T, attend)
        loss_sum, metrics = loss_fn(hidden_TD, model.head_VD, frozen, micro)
        with model.fastest_products(micro.tokens_T):
            (loss_sum / norm).backward()
        for name, (total, count) in metrics.items():
            old_total, old_count = sums.get(name, (0, 0))
            sums[name] = (old_total + total.double(), old_count + count.double())
        progress.add(len(micro.documents))
    return sums


def compute_gradients(
    cfg: Config, run: Run, source: Source, loss_fn: Callable, step: int
) -> tuple[GlobalBatch, list[Transformer], Metrics]:
    """The batch of a step, the teachers of its loss, and its metrics, with gradients of this rank.

    Raises Halted on all ranks if a signal came meanwhile.
    """
    batch = next(source)
    (norm,) = parallel.all_reduce_sum([batch.normalizer], run.device)
    if cfg.lora_dropout:
        run.policy.dropout.begin(step, applied=not batch.has_field("old_logp"))
    # A sampled signal is in the advantages already: the loss needs no teacher.
    teachers = [] if cfg.kd_signal in OWN_TOKENS else run.teachers
    sums = {}
    if norm > 0:
        micro, halt = cfg.micro_batch_tokens, run.stop.halt
        with parallel.as_one():
            sums = forward_backward(
                run.policy, teachers, loss_fn, batch, norm, micro, run.device, halt
            )
    return batch, teachers, sums


def update_weights(cfg: Config, run: Run, step: int) -> dict[str, float]:
    """Take an optimizer step with the gradients of all ranks, and count one that cannot be taken.

    Returns the norm of the gradient and the learning rate.
    """
    grad_norm, finite = clip_gradients(run.policy, cfg.max_grad_norm)
    lr = learning_rate(step, run.steps, cfg.lr, cfg.warmup, cfg.schedule, cfg.lr_floor)
    if not finite:
        run.counters["skipped"] += 1
        run.counters["skipped_in_a_row"] += 1
    elif grad_norm == 0:
        # Nothing to learn from; momentum and weight decay would move the weights all the same.
        run.counters["no_gradient"] += 1
    else:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
        if run.rank == 0:  # counted once, though every rank computes it
            add_cost(run, {"flops": run.optimizer.flops()})
        if run.average:
            update_average(run.average, run.policy, cfg.kd_average)
        run.counters["skipped_in_a_row"] = 0
    run.optimizer.zero_grad()
    return {"train/grad_norm": grad_norm, "train/lr": lr}


def train(cfg: Config, run: Run, source: Source, loss_fn: Callable, stop: StopSignal) -> None:
    """One run to its last checkpoint; the same loop for every mode."""
    about = {"weights": run.weights, "steps": run.steps} | sizes_of(run.policy)
    about["plugins"] = named_digests() or None
    log = RunLogger(run.folder.path, settings_of(cfg), run.resume_step, run.rank, about)
    say_new_rate(cfg, run, log)
    log.note = "generates in shards" if generates_in_shards(run.policy) else ""
    validation = Validation(
        run.dataset,
        run.stop_ids,
        cfg.micro_batch_tokens,
        cfg.eval_tokens,
        teacher=run.teacher,
        vocab=run.vocab_size,
        rank=run.rank,
        world=run.world,
        halt=run.stop.halt,
    )
    steps, clock = run.steps, Clock()
    for step in range(run.resume_step or 0, steps + 1):
        signals = [bool(stop.received), bool(log.error)]
        stopping, failed = parallel.all_reduce_sum(signals, run.device)
        if failed:
            raise parallel.broadcast(log.error)
        is_better = False
        try:
            if not stopping:
                is_better = evaluate(cfg, run, validation, log, clock, step)
        except Halted:  # evaluated is this step when the run goes on
            stopping = True
        is_due = stopping or is_better or saves(cfg, step, steps)
        if is_due and step != run.resume_step:
            with clock.measure("checkpoint"):
                save(cfg, run, source, step)
        if step == steps or stopping:
            break

        began = time.perf_counter()
        before = copy.copy(source)
        try:
            batch, teachers, sums = compute_gradients(cfg, run, source, loss_fn, step)
        except Halted:  # the checkpoint is that of the last whole step
            save(cfg, run, before, step)
            stopping = True
            break
        parallel.sync_gradients(run.policy)
        update = update_weights(cfg, run, step)

        log.samples(step + 1, batch.samples)
        add_cost(run, source.take_cost())
        seconds = time.perf_counter() - began
        values = step_metrics(cfg, run, batch, teachers, sums, seconds) | update
        clock.spent.setdefault("step", []).append(seconds)
        log.metrics(step + 1, values)
        say_progress(cfg, log, clock, step + 1, steps, values)
        if run.counters["skipped_in_a_row"] >= cfg.max_skipped:
            raise RunFailed(
                f"stopped at step {step + 1}: {cfg.max_skipped} steps in a row had no finite "
                f"gradient; {LOWER}"
            )

    source.close()
    stopped_by = (stop.received or "a signal") if stopping else ""
    parallel.on_rank_0(run.rank, functools.partial(finish, cfg, run, log, step, stopped_by))


def say_progress(
    cfg: Config, log: RunLogger, clock: Clock, step: int, steps: int, values: dict[str, float]
) -> None:
    """Say how far a run is and how long it has to go, where that is due."""
    is_quiet = time.monotonic() - log.said > QUIET
    if step % cfg.log_every == 0 or step == steps or is_quiet:
        left = clock.left(
            step=steps - step,
            evaluation=still_due(step, cfg.eval_every, steps),
            checkpoint=still_due(step, cfg.save_every, steps),
        )
        log.progress(step, steps, values, left)


def saves(cfg: Config, step: int, last: int) -> bool:
    """Whether a checkpoint is due after a step."""
    if cfg.save in ("last", "none") or step == 0:
        return step == last
    return due(step, cfg.save_every, last)


def evaluate(
    cfg: Config, run: Run, validation: Validation, log: RunLogger, clock: Clock, step: int
) -> bool:
    """Evaluate and log a step that is due. Returns whether --save best keeps its checkpoint.

    Raises Halted on all ranks if a signal came meanwhile.
    """
    if step == run.resume_step and log.evaluated:
        return note_evaluation(cfg, run, step, log.evaluated)
    if not cfg.eval_examples or not due(step, cfg.eval_every, run.steps):
        return False
    with clock.measure("evaluation"):
        metrics, samples = validation.run(run.policy)
    log.evaluation(step, run.steps, metrics, samples)
    return note_evaluation(cfg, run, step, metrics)


def note_evaluation(cfg: Config, run: Run, step: int, metrics: Mapping[str, float]) -> bool:
    """Return whether --save best keeps this step's checkpoint.

    The best has the highest accuracy, or the lowest loss where nothing is graded. Raises RunFailed
    if the loss is not finite: the model is broken, and the next checkpoint would be.
    """
    label = run.dataset.label
    loss = metrics.get(f"eval/{label}/loss", 0.0)
    if not math.isfinite(loss):
        raise RunFailed(
            f"stopped at step {step}: the loss on the validation examples is {loss}; "
            + (LOWER if step else "the weights that it begins from are broken")
        )
    score = metrics.get(f"eval/{label}/accuracy", -loss)
    if cfg.save != "best" or not step or score <= run.best.get("score", -math.inf):
        return False
    run.best |= {"step": step, "score": score}
    run.folder.best = step
    return True


def check_weights(run: Run, step: int) -> None:
    """Raise RunFailed if a checkpoint would hold what is not finite, or as good as that."""
    trained = [local(p.detach()) for p in run.policy.parameters() if p.requires_grad]
    norms = torch._foreach_norm(trained)  # pyright: ignore[reportPrivateImportUsage]
    broken = not all(bool(torch.isfinite(norm)) for norm in norms)
    (ranks,) = parallel.all_reduce_sum([broken], run.device)
    if ranks:
        raise RunFailed(f"stopped at step {step}: the weights have no finite norm; {LOWER}")


def save(cfg: Config, run: Run, source: Source, step: int) -> None:
    """Checkpoint `step`: the model in Hugging Face form and the trainer's state."""
    check_weights(run, step)
    if cfg.save == "none":
        return
    state = {"source": parallel.gather(source.state()), "counters": run.counters, "best": run.best}

    def write_model(folder: Path) -> None:
        save_model(run.policy, folder, run.tokenizer, run.stop_ids, sampling_of(cfg))
        measured = {}
        for line in read_metrics(run.folder.path):
            measured = line if line["step"] == step else measured
        card = model_card(step, settings_of(cfg), run.weights, measured, sys.argv)
        (folder / CARD).write_text(card, encoding="utf-8")

    run.folder.save(
        step, run.policy, run.optimizer, write_model, state, run.trained_on, run.average
    )


def restore(run: Run, source: Source) -> None:
    """Continue the checkpoint `run.resume_step`: optimizer, stream of batches, counters."""
    assert run.resume_step is not None
    state = run.folder.load(run.resume_step, run.policy, run.optimizer, run.average)
    sources = state["source"]  # one a rank; there may be more ranks now than before
    source.load(sources[run.rank] if run.rank < len(sources) else sources[0])
    run.counters |= state["counters"]
    run.best |= state.get("best", {})
    run.folder.best = run.best.get("step")  # pyright: ignore[reportAttributeAccessIssue]
    parallel.on_rank_0(run.rank, run.folder.tidy)  # it may be the last checkpoint that is due


def add_cost(run: Run, cost: Mapping[str, float]) -> None:
    """Add to what this step has cost this rank."""
    for name, amount in cost.items():
        run.cost[name] = run.cost.get(name, 0) + amount


def step_metrics(
    cfg: Config,
    run: Run,
    batch: GlobalBatch,
    teachers: Sequence[Transformer],
    sums: Metrics,
    seconds: float,
) -> dict[str, float]:
    """A step's line of metrics.jsonl: losses over all ranks, speed, and the cost of the run so far.

    `sums` is empty where nothing was computed, as no row of the batch carried loss.
    """
    tokens, flops = sum(batch.lengths), 0
    if sums:
        # GSPO and its kin need the ratios of whole sequences first: one more pass of the head.
        needs_ratios = cfg.mode == "grpo" and VARIANTS[cfg.grpo_variant].whole_sequences
        head_passes = int(needs_ratios and batch.has_field("old_logp"))
        if cfg.mode == "kd":  # which tokens are listed, and what they weigh, is asked before, too
            own = (cfg.kd_signal == "student_topk", cfg.kd_weight_by == "student_entropy")
            head_passes = sum(own)
        flops = step_flops(batch, run.policy, None, run.vocab_size, head_passes)
        for number, teacher in enumerate(teachers):
            seen = batch.for_teacher(number)
            flops += forward_flops(teacher, seen.lengths, seen.loss_rows, run.vocab_size)
            if cfg.kd_weight_by == "teacher_entropy":
                flops += head_flops(teacher, seen.loss_rows, run.vocab_size)
            add_cost(run, {"teacher_tokens": sum(seen.lengths)})
    add_cost(run, {"tokens": tokens, "flops": flops})
    own = [tokens, flops, *(run.cost.get(name, 0) for name in COSTS)]
    tokens, flops, *costs = parallel.all_reduce_sum(own, run.device)
    run.cost.clear()
    for name, cost in zip(COSTS, costs, strict=True):
        run.counters[name] += int(cost)

    values = {}
    for name, (total, count) in parallel.reduce_metrics(sums | batch.metrics).items():
        if count:
            values[name if "/" in name else f"train/{name}"] = total / count
    for name in (*COSTS, "skipped", "no_gradient"):
        values[f"train/{name}"] = run.counters[name]
    values |= {"train/seconds": seconds, "train/tokens_per_second": tokens / seconds}
    if run.device.type == "cuda":
        values["train/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        peak = peak_flops(torch.cuda.get_device_name())
        if peak:
            values["train/mfu"] = flops / seconds / peak / run.world
    return values


def settings_of(cfg: Config) -> dict[str, Any]:
    """The options of a run as its config.json has them."""
    return options.resolved(cfg, without=("name", "resume", "dry_run"))


def say_new_rate(cfg: Config, run: Run, log: RunLogger) -> None:
    """Say at which learning rate a run goes on whose options or steps are not what they were.

    The schedule is a function of the step and of the number of steps alone, so that a run which is
    resumed as it was goes on to the bit: other --steps stretch it, from here on.
    """
    step = run.resume_step
    if not step or step >= run.steps or not log.before or "steps" not in log.before:
        return
    old = dataclasses.asdict(cfg) | log.before["options"]
    shape = [old[name] for name in ("lr", "warmup", "schedule", "lr_floor")]
    was = learning_rate(min(step, log.before["steps"] - 1), log.before["steps"], *shape)
    now = learning_rate(step, run.steps, cfg.lr, cfg.warmup, cfg.schedule, cfg.lr_floor)
    if now != was:
        log.say(
            f"the learning rate goes on at {now:.3g}, not at {was:.3g}: the schedule is that of "
            f"{run.steps:,} steps in all (before: {log.before['steps']:,})"
        )


def finish(cfg: Config, run: Run, log: RunLogger, step: int, stopped_by: str) -> None:
    """Say how a run ended after `step`, with its table and curves unless a signal stopped it.

    Raises RunFailed if something of the run could not be written.
    """
    path = run.folder.path
    if log.error:
        raise log.error
    rows = []
    if stopped_by:
        goes_on = f"continue with {resume_command(cfg.runs, path.name)}"
        if cfg.save == "none":
            goes_on = "nothing is saved with --save none"
        log.say(f"stopped by {stopped_by} after step {step}; {goes_on}")
    else:
        try:
            draw_curves(path)
        except OSError as e:
            raise RunFailed(
                f"{path}/curves.png could not be written ({e.strerror}); the run itself is complete"
            ) from None
        rows = result_rows(path, run.teacher_folder)
        log.say(summary(path, rows))
        idle = run.counters["no_gradient"]
        if idle:
            no_spread = " (no group's rewards differed)" * (cfg.mode == "grpo")
            nothing = "; NOTHING WAS LEARNED" * (idle == run.steps)
            log.say(f"{idle:,} of {run.steps:,} steps had no gradient{no_spread}{nothing}")
        if run.best:
            score = f"{run.best['score']:.4f} at step {run.best['step']}"
            log.say(f"the best evaluation: {score}; {path}/checkpoints/step-{run.best['step']}")
        skipped = run.counters["skipped_in_a_row"]
        if skipped:
            raise RunFailed(f"the last {skipped} steps had no finite gradient; {LOWER}")
    log.close(rows)


# --- the command ----------------------------------------------------------------------------------


def launch(cfg: Config, at_most_a_tenth: bool) -> None:
    """One run, from its options to its last checkpoint. at_most_a_tenth: see `setup`."""
    plan = setup(cfg, at_most_a_tenth)
    cfg, rank = plan.cfg, plan.place.rank
    check_memory(cfg, plan)
    rehearse(cfg, plan)
    if cfg.show_batch:
        if rank == 0:
            batch = next(data_stream(cfg, plan.dataset, plan.place.rank, plan.place.world))
            show_batch(batch, plan.tokenizer, cfg.show_batch)
        return
    steps = number_of_steps(cfg, len(plan.dataset))
    if cfg.dry_run:
        path = Path(cfg.runs) / (cfg.name or f"{cfg.mode}-<time>")
        if cfg.name and not cfg.resume and has_output(path):
            raise UserError(f"run {path} exists; --resume would continue it")
        done = RunFolder(path).steps() if cfg.resume else []
        resume_step = done[-1] if done else None
        refuse_fewer(steps, resume_step, path)
        if rank == 0:
            say("\n".join(overview(cfg, plan, steps, path, resume_step)))
            show_first(cfg, plan)
        return
    with open_run(
        cfg.runs, cfg.name, cfg.mode, cfg.resume, cfg.max_checkpoints, settings_of(cfg), rank
    ) as (folder, resume_step):
        refuse_fewer(steps, resume_step, folder.path)
        if rank == 0:
            say("\n".join(overview(cfg, plan, steps, folder.path, resume_step)))
        run = load_models(cfg, plan, folder, resume_step)
        source, loss_fn = build(cfg, run)
        if resume_step is not None:
            restore(run, source)
        with run.stop as stop:
            try:
                train(cfg, run, source, loss_fn, stop)
            except KeyboardInterrupt:
                if rank == 0:
                    say(f"left at once; continue with {resume_command(cfg.runs, folder.path.name)}")
                raise


def main(argv: list[str]) -> int:
    """The command `train.py` with these arguments. Returns its exit code."""

    def run() -> None:
        notes, stored = [], {}
        found = options.peek(Config, argv, "name", "runs", "resume", "eval_examples")
        if found.get("resume") and found.get("name"):  # else `validate` says what is wrong
            runs = found.get("runs", Config.runs)
            stored = stored_config(runs, found["name"], optional=found["resume"] == "auto")
        cfg = options.parse(Config, argv, stored, notes=notes)
        for note in notes if parallel.speaks() else ():
            say(note)
        with parallel.telling():
            launch(cfg, at_most_a_tenth="eval_examples" not in stored | found)

    def tracked() -> None:
        try:
            run()
        except Exception as e:
            own = where_raised(e)
            words = own or str(e) or type(e).__name__
            if parallel.speaks():
                report_failure(" ".join(words.split()))
            if own and not isinstance(e, (UserError, RunFailed)):
                raise UserError(own) from None
            raise

    return as_command("train.py", tracked, "interrupted", parallel.is_first_to_say)


if __name__ == "__main__":
    keep_freed_memory()
    parallel.leave(main(sys.argv[1:]))
