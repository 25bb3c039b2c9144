"""What a run says before it begins, and all that `--dry_run` does.

Which models and where their weights are from, what is trained on, for how long, what it takes in
memory and on the disk, and what is written.
"""

import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from config import OWN_TOKENS, SELF, Config, needs_old_logp, teachers_of
from data.batch import GlobalBatch
from data.show import show_batch
from data.tasks import TASKS, Example, grade
from errors import say
from memory import check, device_bytes, needs, peak, room_of, size_of
from model.load import Checkpoint
from model.lora import parse_targets
from model.transformer import ModelConfig
from plugins import named_digests
from prepare import Plan

LOOKED_AT = 64  # examples whose mean length is shown
HELD_OUT = 0.25  # a larger part of the examples than this for validation is worth a word


def overview(cfg: Config, plan: Plan, steps: int, folder: Path, resumed: int | None) -> list[str]:
    """The lines of the start block.

    Args:
        steps: Of the whole run.
        folder: Of the run.
        resumed: The step that it goes on from, or None.
    """
    place = plan.place
    goes_on = "" if resumed is None else f" (resumed at step {resumed})"
    lines = [
        f"{cfg.mode} on {place.world} x {place.device.type}, {plan.dataset.label}: {steps:,} steps "
        f"-> {folder}{goes_on}",
        *_models(cfg, plan, resumed),
        *_data(cfg, plan),
        _per_step(cfg, plan, steps),
        f"optimizer  {cfg.optimizer}, lr {cfg.lr:g} ({cfg.schedule}, warm-up {cfg.warmup}), "
        f"weight decay {cfg.weight_decay:g}; what is not given has the defaults of {cfg.defaults} "
        "models (--defaults)",
        *_space(cfg, plan, folder),
    ]
    own = named_digests()
    if own:
        lines.append(f"plugins    {own} (SHA-256)")
    if place.device.type == "cpu":
        lines.append(f"threads    {plan.threads}")
    if cfg.lora_dropout and needs_old_logp(cfg):
        lines.append(
            "--lora_dropout is not applied in this run: log-probs under a mask cannot be compared "
            "with those of the rollout"
        )
    return lines


def _models(cfg: Config, plan: Plan, resumed: int | None) -> Iterator[str]:
    is_toy = cfg.mode == "grpo" and cfg.model == "tiny"
    size, adapters = sizes(cfg, plan.student.config)
    lora = f", {adapters:,} more in adapters that are trained" if adapters else ""
    weights = _weights(plan.student, is_toy)
    if resumed is not None:
        weights = f"weights of step {resumed}; the run began with {weights}"
    yield f"policy     {cfg.model}: {size:,} parameters{lora}, {weights}"
    for name, teacher in zip(teachers_of(cfg).values(), plan.teachers, strict=False):
        of = "the policy" if name in SELF else _weights(teacher, not name)
        size, _ = sizes(cfg, teacher.config)
        yield f"teacher    {name or 'tiny-teacher'}: {size:,} parameters, {of}"
    if plan.reference:
        of = _weights(plan.reference, False) if cfg.reference else "the policy as it begins"
        yield f"reference  {cfg.reference or cfg.model}: {of}"


def _weights(checkpoint: Checkpoint, is_toy: bool) -> str:
    """Where a model's weights are from, in words. is_toy: it is trained on first use."""
    if is_toy:
        return "weights of the toy task's own, which is trained on first use"
    if checkpoint.folder:
        return f"weights of {checkpoint.folder}"
    return "RANDOM WEIGHTS (a preset is a shape; a folder or a hub id has weights)"


def sizes(cfg: Config, config: ModelConfig) -> tuple[int, int]:
    """Parameters of a model, and those of the adapters that --lora_rank would add."""
    size = size_of(config, cfg.lora_rank, parse_targets(cfg.lora_targets))
    return size.blocks + size.around, size.adapters


def _data(cfg: Config, plan: Plan) -> Iterator[str]:
    data = plan.dataset
    trained, held = len(data), len(data.validation)
    of = f" from {cfg.eval_data}" if cfg.eval_data else ""
    counts = f"{trained:,} examples trained on" if trained else "endless"
    counts += f", {held:,} for validation{of}, {data.dropped.total():,} dropped"
    yield f"data       {cfg.data}: {counts}"
    if len(data.sources) > 1:
        for source, size in zip(data.sources, data.sizes, strict=False):
            yield f"           {source.path}: {size:,} trained on"
    if lacks_marks(data.validation[:LOOKED_AT]):
        yield (
            "           ANSWERS ARE NOT MARKED (`#### 7` or a box): accuracy, and as a reward, "
            "counts marked ones alone, lenient any"
        )
    if data.sources and not cfg.eval_data and held > HELD_OUT * (held + trained):
        yield (
            f"           VALIDATION TAKES {held:,} OF {held + trained:,} EXAMPLES; fewer with "
            "--eval_examples, none with --eval_data FILE"
        )


def lacks_marks(examples: Sequence[Example]) -> bool:
    """Whether the data's own answers are all wrong to their grader, which looks for a mark."""
    own = [e for e in examples if e.has_answer and e.answer is not None and e.task in TASKS]
    verdicts = [grade(e, e.own_answer) for e in own if not TASKS[e.task].waits]
    return bool(verdicts) and not any(verdict.strict for verdict in verdicts)


def _per_step(cfg: Config, plan: Plan, steps: int) -> str:
    data, prompts, passes = plan.dataset, cfg.batch_size, 1
    if cfg.mode == "grpo":
        prompts, passes = cfg.batch_size // cfg.grpo_samples, cfg.grpo_ppo_epochs
    number = min(len(data), LOOKED_AT) or LOOKED_AT
    mean = sum(len(data.get(i)) for i in range(number)) / number
    text = f"steps      {steps:,} of {cfg.batch_size:,} examples"
    if cfg.mode == "grpo" or (cfg.mode == "kd" and cfg.kd_prefix != "data"):
        text = f"steps      {steps:,} of {cfg.batch_size:,} samples, at most {cfg.sample_tokens:,} "
        text += f"new tokens each, to {prompts:,} prompts"
    text += f" (about {mean * prompts:,.0f} tokens)"
    if not cfg.steps:
        text += f", as --epochs {cfg.epochs:g} takes"
    if len(data):
        text += f": {steps / passes * prompts / len(data):.3g} epochs"
    if cfg.warmup >= steps > 0:
        text += f"; THE WARM-UP ({cfg.warmup}) IS NOT OVER BEFORE THE RUN IS"
    return text


def _space(cfg: Config, plan: Plan, folder: Path) -> Iterator[str]:
    """What a rank's memory holds, and the most that checkpoints take on the disk."""
    parts = needs(cfg, plan.job, plan.shards, cfg.micro_batch_tokens)
    device = plan.place.device
    most = peak(parts, device.type == "cuda")
    name = "the CPU"
    if device.type == "cuda":
        name = f"each {torch.cuda.get_device_name(device)}"
    there = device_bytes(cfg, device)
    has = f" of {bytes_of(there)}" if there < math.inf else ""
    sharded = ""
    if plan.shards.policy or plan.shards.frozen:
        sharded = f"; models in shards of {plan.shards.ranks} ranks"
    yield f"memory     about {bytes_of(most)}{has} on {name}{sharded}"
    yield "           " + ", ".join(f"{name} {bytes_of(size)}" for name, size in parts.items())
    size, adapters = sizes(cfg, plan.student.config)
    trained = adapters or size
    master = max(plan.place.compute_dtype.itemsize, 4)
    checkpoint = master * (size + 2 * trained + (adapters and trained))
    disk = checkpoint * checkpoints_at_once(cfg)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    short = "" if disk < free else "; THIS IS NOT ENOUGH"
    yield (
        f"disk       at most {bytes_of(disk)}: checkpoints of {bytes_of(checkpoint)} (--save "
        f"{cfg.save}); {bytes_of(free)} are free{short}"
    )
    yield (
        f"writes     {folder}/: config.json, environment.json, sittings.jsonl, metrics.jsonl, "
        "samples.jsonl, curves.png, checkpoints/"
    )


def check_memory(cfg: Config, plan: Plan) -> None:
    """Refuse a run that does not fit, before a weight is read. Raises UserError."""
    check(cfg, plan.job, plan.shards, room_of(cfg, plan.job), bytes_of)


def checkpoints_at_once(cfg: Config) -> int:
    """How many checkpoints of a run there are at most, while the newest one is written."""
    kept = {"every": cfg.max_checkpoints + 1, "best": cfg.max_checkpoints + 2, "last": 1}
    return kept.get(cfg.save, 0)


def bytes_of(count: float) -> str:
    """A number of bytes, as people read it."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def show_first(cfg: Config, plan: Plan) -> None:
    """Print the first example as the models see it, with what is trained on in brackets."""
    document, example = plan.dataset.get(0), plan.dataset.example(0)
    batch = GlobalBatch([document])
    show_batch(batch, plan.tokenizer, 1)
    if document.teacher_tokens is not None:
        say("--- what the teacher sees of it")
        show_batch(batch.for_teacher(document.teacher), plan.tokenizer, 1)
    if plan.reward:
        say(f"--- rewarded by {cfg.grpo_reward}; gold answer: {example.answer}")
    elif cfg.kd_signal in OWN_TOKENS or cfg.kd_prefix == "student":
        say("--- the student's own answers are trained on")
