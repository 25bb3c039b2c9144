"""Train a small reasoning language model: `torchrun train.py --mode kd`, `python train.py --mode sft`.

A mode is a source of batches plus a loss; everything else is shared. Read `train()` first: it is the whole loop.
"""

import contextlib
import functools
import sys
import time

import torch

import options
from config import Config, needs_old_logp, validate
from curves import draw_curves, summary
from data.batch import WEIGHTINGS, constant_length
from data.dataset import Order, Stream
from errors import RunFailed, as_command
from kernels.attention import PackedAttention
from losses.grpo import VARIANTS, grpo_loss
from losses.kd import kd_loss
from losses.sft import sft_loss
from model import parallel
from model.flops import forward_flops, generation_flops, peak_flops, step_flops
from model.generate import generate
from model.optim import clip_gradients, learning_rate
from prepare import COSTS, TEACHER, prepare, toy_tokenizer
from rl.logprobs import add_correction, add_logprobs, kl_penalty
from rl.rollout import Mixed, Rollouts
from run import RunLogger, StopSignal, stored_config
from validation import evaluate

__all__ = [
    "Config",
    "TEACHER",
    "validate",
    "toy_tokenizer",
    "forward_backward",
    "launch",
    "main",
]  # what others take from here

# --- the mode: a source plus a loss --------------------------------------------------------------------------------


def build(cfg, run):
    """The only branch on the mode. source yields Batches; loss_fn(hidden_TD, head_VD, frozen, batch) -> (sum, metrics)."""
    if cfg.mode == "grpo":
        return rewarded_rollouts(cfg, run), functools.partial(
            grpo_loss,
            variant=cfg.grpo_variant,
            clip_low=cfg.grpo_clip_low,
            clip_high=cfg.grpo_clip_high,
            kl=cfg.grpo_kl_estimator,
            beta=cfg.grpo_kl_coef if cfg.grpo_kl_in == "loss" else 0.0,
            entropy=cfg.grpo_entropy_coef,
            temperature=cfg.sample_temperature,
            vocab=run.vocab,
            kd=cfg.grpo_kd_coef,
            divergence=cfg.kd_divergence,
            kd_beta=cfg.kd_beta,
        )
    data = Stream(
        run.dataset, cfg.batch_size, cfg.seed, WEIGHTINGS[cfg.weighting], run.rank, run.world
    )
    if cfg.mode == "sft":
        return data, sft_loss
    if cfg.kd_signal == "sampled":
        return teacher_advantages(cfg, run), functools.partial(
            grpo_loss,
            variant="token",
            clip_low=0.2,
            clip_high=0.2,
            temperature=cfg.sample_temperature,
            vocab=run.vocab,
        )
    loss_fn = functools.partial(
        kd_loss,
        divergence=cfg.kd_divergence,
        beta=cfg.kd_beta,
        temperature=cfg.kd_temperature,
        t_squared=cfg.kd_t_squared,
        ce=cfg.kd_ce,
        topk=cfg.kd_topk if cfg.kd_signal == "topk" else 0,
        vocab=run.vocab,
    )
    if cfg.kd_prefix == "data":
        return data, loss_fn
    written = rollouts(cfg, run, run.model if cfg.kd_prefix == "student" else run.teacher)
    return Mixed(data, written, cfg.kd_mix, cfg.seed) if cfg.kd_mix < 1 else written, loss_fn


def rollouts(cfg, run, author, judge=None, score=None, weighting=None, samples=1, **more):
    """Batches of what `author` (a model) writes on the dataset's prompts."""
    formatter, order = (
        run.dataset.formatter,
        Order(len(run.dataset), cfg.seed + (cfg.kd_mix < 1)),
    )  # beside the data, not along with it

    def prompt_at(position):
        example = run.dataset.example(order(position))
        return example, formatter.prompt(example)

    def write(prompts, seeds):
        done = generate(
            author,
            prompts,
            cfg.sample_tokens,
            run.stop_ids,
            vocab=run.vocab,
            temperature=cfg.sample_temperature,
            top_k=cfg.sample_top_k,
            top_p=cfg.sample_top_p,
            seeds=seeds,
            batch_size=cfg.sample_batch,
        )
        new = [len(c.tokens) for c in done]
        flops = generation_flops(author, prompts, new, run.vocab)
        run.cost.update(
            sampled_tokens=sum(new), teacher_tokens=sum(new) * (author is run.teacher), flops=flops
        )
        return done

    return Rollouts(
        prompt_at,
        write,
        judge,
        score,
        per_batch=cfg.batch_size // samples,
        samples=samples,
        seed=cfg.seed,
        weighting=weighting or WEIGHTINGS[cfg.weighting],
        logged=cfg.sample_log,
        rank=run.rank,
        world=run.world,
        **more,
    )


def rewarded_rollouts(cfg, run):
    """The source of `grpo`: groups of samples with rewards, and the frozen log-probs that their loss reads."""

    def judge(example, completion):
        text = run.tokenizer.decode(completion.tokens, skip_special=True)
        opened = (
            run.dataset.formatter.opened(example) if "format" in run.reward.parts else ""
        )  # no other part looks at it
        return *run.reward(example, text, len(completion.tokens), completion.stopped, opened), text

    def score(documents):
        if needs_old_logp(cfg):
            log_probs(cfg, run, documents, "old_logp", run.model)
        if run.reference:
            log_probs(cfg, run, documents, "ref_logp", run.reference)
        if cfg.grpo_tis != "none":
            add_correction(
                documents, cfg.grpo_tis, cfg.grpo_tis_cap, by_sequence=VARIANTS[cfg.grpo_variant][2]
            )

    kl_in_reward = cfg.grpo_kl_coef > 0 and cfg.grpo_kl_in == "reward"
    price = functools.partial(kl_penalty, beta=cfg.grpo_kl_coef) if kl_in_reward else None
    weighting = functools.partial(constant_length, length=cfg.sample_tokens)
    return rollouts(
        cfg,
        run,
        run.model,
        judge,
        score,
        WEIGHTINGS.get(VARIANTS[cfg.grpo_variant][1], weighting),
        cfg.grpo_samples,
        baseline=cfg.grpo_advantage,
        updates=cfg.grpo_minibatches_per_rollout,
        epochs=cfg.grpo_ppo_epochs,
        refills=cfg.grpo_dynamic_sampling_rounds,
        mask_truncated=cfg.grpo_mask_truncated,
        price=price,
        correctness=run.reward.correctness,
    )


def teacher_advantages(cfg, run):
    """Samples whose advantage is log p_teacher − log p_student of each token: on average the gradient of the reverse KL."""

    def score(documents):
        log_probs(cfg, run, documents, "old_logp", run.model)
        log_probs(cfg, run, documents, "teacher_logp", run.teacher)
        for d in documents:
            d.fields["advantage"] = d.fields.pop("teacher_logp") - d.fields["old_logp"]

    return rollouts(cfg, run, run.model, score=score)


def log_probs(cfg, run, documents, name, model):
    add_logprobs(
        documents,
        name,
        model,
        temperature=cfg.sample_temperature,
        vocab=run.vocab,
        micro_batch_tokens=cfg.micro_batch_tokens,
        device=run.device,
    )
    lengths, rows = [len(d) for d in documents], sum((d.weights != 0).sum() for d in documents)
    run.cost.update(
        teacher_tokens=sum(lengths) * (model is run.teacher),
        flops=forward_flops(model, lengths, rows, run.vocab),
    )


@torch.no_grad()
def score(teacher, micro, attend):
    """What the loss needs from frozen models: the teacher's hidden loss rows and its head."""
    if teacher is None:
        return None
    hidden_TC = teacher(micro.tokens_T, micro.positions_T, attend)
    return micro.select(hidden_TC), teacher.head_VD


def forward_backward(model, teacher, loss_fn, batch, norm, micro_batch_tokens, device):
    """Gradients of the global batch's loss, micro-batch by micro-batch; returns the metrics' (sum, count) pairs."""
    sums = {}
    for micro in batch.split(micro_batch_tokens):
        micro = micro.to(device)
        attend = PackedAttention(micro.lengths, device)
        frozen = score(teacher, micro, attend)
        loss_sum, metrics = loss_fn(
            model(micro.tokens_T, micro.positions_T, attend), model.head_VD, frozen, micro
        )
        (loss_sum / norm).backward()
        for name, (total, count) in metrics.items():
            old = sums.get(name, (0, 0))
            sums[name] = (old[0] + total.double(), old[1] + count.double())
    return sums


# --- the loop ------------------------------------------------------------------------------------------------------


def launch(cfg):
    """Prepare and train; however that ends, the run's folder is free again and signals do what they did before."""
    with contextlib.ExitStack() as held:
        run = prepare(cfg, held, launch)
        if run is None:
            return
        run.source, run.loss_fn = build(cfg, run)
        if run.start is not None:
            saved = run.folder.load(run.start, run.model, run.optimizer)
            run.source.load(saved["source"][run.rank if run.rank < len(saved["source"]) else 0])
            run.counters |= saved["counters"]  # those of an older run lack what it did not count
        train(cfg, run, held.enter_context(StopSignal()))


def train(cfg, run, stop):
    """One run to its last checkpoint; the same loop for every mode."""
    log = RunLogger(
        run.folder.path, options.resolved(cfg, without=("name", "resume")), run.start, run.rank
    )
    start, steps, counters = run.start or 0, run.steps, run.counters
    trained, frozen = (
        sum(p.numel() for p in run.model.parameters() if p.requires_grad == t)
        for t in (True, False)
    )
    log.say(
        f"{cfg.mode}: {trained:,} parameters{f' beside {frozen:,} frozen ones' if frozen else ''} on {run.world} x {run.device.type}, "
        f"{run.dataset.label}, {steps} steps -> {run.folder.path}"
        + (f" (resumed at step {start})" if run.start else "")
    )
    if cfg.lora_dropout and needs_old_logp(cfg):
        log.say(
            "--lora_dropout is not applied in this run: log-probs under a mask cannot be compared with those of the rollout"
        )
    spent = 0.0

    for step in range(start, steps + 1):
        stopping, failed = parallel.all_reduce_sum(
            [bool(stop.received), bool(log.error)], run.device
        )
        if failed:
            raise parallel.broadcast(log.error)
        seen = step == run.start  # the checkpoint that is continued was evaluated and saved already
        if cfg.eval_examples and due(step, cfg.eval_every, steps) and not seen:
            run_on = dict(rank=run.rank, world=run.world, teacher=run.teacher, vocab=run.vocab)
            log.evaluation(
                step,
                steps,
                *evaluate(
                    run.model,
                    run.dataset,
                    run.stop_ids,
                    sft_loss,
                    cfg.micro_batch_tokens,
                    cfg.eval_tokens,
                    **run_on,
                ),
            )
        if (step and due(step, cfg.save_every, steps) or stopping) and not seen:
            state = {"source": parallel.gather(run.source.state()), "counters": counters}
            save = functools.partial(
                run.folder.save,
                step,
                run.model,
                run.optimizer,
                run.tokenizer,
                run.stop_ids,
                state,
                run.trained_on,
            )
            parallel.on_rank_0(run.rank, save)
        if step == steps or stopping:
            break

        clock = time.perf_counter()
        batch = next(run.source)
        (norm,) = parallel.all_reduce_sum([batch.normaliser], run.device)
        if cfg.lora_dropout:
            run.model.dropout.begin(step, applied="old_logp" not in batch.fields)
        teacher = (
            run.teacher if cfg.kd_signal != "sampled" else None
        )  # its word is in the advantages already
        sums = (
            forward_backward(
                run.model, teacher, run.loss_fn, batch, norm, cfg.micro_batch_tokens, run.device
            )
            if norm > 0
            else {}
        )
        parallel.sync_gradients(run.model)
        grad_norm, finite = clip_gradients(run.model, cfg.max_grad_norm)
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup, cfg.schedule, cfg.lr_floor)
        if not finite:
            counters["skipped"] += 1
            counters["skipped_in_a_row"] += 1
        elif (
            grad_norm == 0
        ):  # nothing to learn from: momentum and weight decay would move the weights all the same
            counters["no_gradient"] += 1
        else:
            for group in run.optimizer.param_groups:
                group["lr"] = lr
            run.optimizer.step()
            counters["skipped_in_a_row"] = 0
        run.optimizer.zero_grad()

        log.samples(step + 1, batch.samples)
        values = step_metrics(cfg, run, batch, teacher, sums, time.perf_counter() - clock) | {
            "train/grad_norm": grad_norm,
            "train/lr": lr,
        }
        spent += values["train/seconds"]
        log.metrics(step + 1, values)
        if (step + 1) % cfg.log_every == 0 or step + 1 == steps:
            log.progress(step + 1, steps, values, spent / (step + 1 - start) * (steps - step - 1))
        if counters["skipped_in_a_row"] >= cfg.max_skipped:
            raise RunFailed(
                f"stopped at step {step + 1}: {cfg.max_skipped} steps in a row had no finite gradient; lower --lr or look at the data"
            )

    run.source.close()
    parallel.on_rank_0(run.rank, functools.partial(finish, cfg, run, log, step, stop, stopping))


def finish(cfg, run, log, step, stop, stopping):
    """The last words of a run after `step`. Raises RunFailed if something of it could not be written."""
    if log.error:
        raise log.error
    if stopping:
        elsewhere = "" if cfg.runs == "runs" else f" --runs {cfg.runs}"
        log.say(
            f"stopped by {stop.received or 'a signal'} after step {step}; continue with --name {run.folder.path.name}{elsewhere} --resume"
        )
    else:
        try:
            draw_curves(run.folder.path)
        except OSError as e:
            raise RunFailed(
                f"{run.folder.path}/curves.png could not be written ({e.strerror}); the run itself is whole"
            ) from None
        log.say(summary(run.folder.path, run.teacher_folder))
    log.close()


def step_metrics(cfg, run, batch, teacher, sums, seconds):
    """One step's line of metrics.jsonl: losses over all ranks, speed, the cost so far, and on a known GPU the share of its peak, by the update."""
    tokens = len(batch.tokens_T)
    ratios_first = (
        cfg.mode == "grpo" and VARIANTS[cfg.grpo_variant][2] and "old_logp" in batch.fields
    )  # see grpo_loss
    flops = (
        step_flops(batch, run.model, teacher, run.vocab, head_passes=int(ratios_first))
        if sums
        else 0
    )  # no sums: nothing was computed
    run.cost.update(tokens=tokens, teacher_tokens=tokens if teacher and sums else 0, flops=flops)
    tokens, flops, *cost = parallel.all_reduce_sum(
        [tokens, flops, *(run.cost[name] for name in COSTS)], run.device
    )
    run.cost.clear()
    run.counters |= {name: run.counters[name] + int(value) for name, value in zip(COSTS, cost)}
    name = lambda k: k if "/" in k else f"train/{k}"
    values = {
        name(k): total / count
        for k, (total, count) in parallel.reduce_metrics(sums | batch.metrics).items()
        if count
    }
    values |= {f"train/{name}": run.counters[name] for name in (*COSTS, "skipped", "no_gradient")}
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
    def run():
        cfg = options.parse(Config, argv, conditions=False)  # to learn which run it is
        stored = stored_config(cfg.runs, cfg.name) if cfg.resume and cfg.name else {}
        launch(options.parse(Config, argv, stored))

    return as_command("train.py", run, "interrupted")


if __name__ == "__main__":
    code = main(sys.argv[1:])
    parallel.close()
    sys.exit(code)
