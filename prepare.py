"""What a run needs before its first step, in stages: options, then data, then weights.

`setup` checks all that can be checked before a weight is read; `load_models` reads or makes the
weights. `train.launch` calls the two, and opens the run's folder between them.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import AVERAGE, SELF, Config, listed_ids, teachers_of, validate
from data.batch import consecutive
from data.dataset import Dataset
from data.formatter import Formatter
from data.record import training_record
from data.teacher_cache import TeacherCache, weights_digest
from data.tokenizer import Tokenizer, parse_template_kwargs
from errors import UserError, say
from files import check_folder
from kernels.cpu import choose_threads
from kernels.divergences import DIVERGENCES
from losses.grpo import VARIANTS
from memory import Job, Shards, choose_shards, fitting_tokens
from model import parallel
from model.flops import forward_flops
from model.lineage import PROMPT_OPTIONS, Lineage
from model.load import (
    Checkpoint,
    describe,
    load_frozen,
    load_policy,
    peft_base_name,
    policy_vocab_size,
    shared_vocab_size,
    stop_ids,
    without_layers,
)
from model.lora import LoraConfig, parse_targets
from model.optim import MuonAdamW, average_of, build_optimizer
from model.presets import RANDOM
from model.transformer import Transformer
from plugins import Table
from rl.advantage import ADVANTAGES
from rl.logprobs import teacher_topk
from rl.reward import Reward, parse_reward
from run import RunFolder, StopSignal
from toy_models import STUDENT, TEACHER, toy_model, toy_tokenizer

# What a run has cost so far, over all ranks; its evaluations are not counted.
COSTS = ("tokens", "sampled_tokens", "teacher_tokens", "flops")

# Steps that changed nothing: the gradient was not finite (now, in a row), or 0 everywhere.
STEP_COUNTERS = ("skipped", "skipped_in_a_row", "no_gradient")


@dataclasses.dataclass
class Plan:
    """What is known of a run before a weight is read."""

    place: parallel.Device
    student: Checkpoint
    teachers: list[Checkpoint]
    reference: Checkpoint | None
    tokenizer: Tokenizer
    vocab_size: int  # head rows that take part in the loss
    dataset: Dataset
    reward: Reward | None
    shards: Shards
    job: Job
    cfg: Config  # with the numbers that "auto" and the default --eval_examples stand for
    threads: str  # how many, in words


@dataclasses.dataclass
class Run:
    """What `build` and the loop work with."""

    device: torch.device
    rank: int
    world: int
    folder: RunFolder
    resume_step: int | None  # the step of the checkpoint that is continued; None: a new run
    steps: int
    tokenizer: Tokenizer
    vocab_size: int
    stop_ids: list[int]
    dataset: Dataset
    reward: Reward | None
    policy: Any  # a Transformer; with LoRA adapters it has `dropout`, too
    teachers: list[Transformer]  # none where a cache stands in for one
    average: Transformer | None  # the one of them that follows the policy
    teacher_folder: Path | None  # of a single teacher
    reference: Transformer | None
    optimizer: MuonAdamW
    trained_on: Lineage  # what the policy is trained on: the record in its checkpoints
    weights: dict[str, str]  # where those of the policy, the teachers and the reference are from
    best: dict[str, float] = dataclasses.field(default_factory=dict)  # for --save best
    stop: StopSignal = dataclasses.field(default_factory=StopSignal)
    counters: dict[str, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys((*COSTS, *STEP_COUNTERS), 0)
    )
    cost: dict[str, float] = dataclasses.field(default_factory=dict)  # this rank's, this step

    @property
    def teacher(self) -> Transformer | None:
        """The teacher, where there is a single one."""
        return self.teachers[0] if len(self.teachers) == 1 else None


def setup(cfg: Config, at_most_a_tenth: bool = False) -> Plan:
    """Check everything that can be checked before a weight is read. Raises UserError.

    at_most_a_tenth: nobody has said how many examples are held out: of a file no more than that.
    """
    validate(cfg)
    place = parallel.choose_device(cfg.device, cfg.dtype, cfg.kernels)
    if len(set(parallel.gather(repr(cfg)))) > 1:
        raise UserError("the ranks have different options; start all of them by the same command")
    student, teachers, reference = describe_checkpoints(cfg)
    with parallel.as_one():
        tokenizer = choose_tokenizer(cfg, student, teachers)
        vocab_size = loss_vocab_size(cfg, tokenizer, student, teachers)
        if reference and shared_vocab_size(tokenizer, student.config, reference) < vocab_size:
            raise UserError(
                f"--reference {cfg.reference} knows fewer of the tokenizer's {vocab_size:,} ids; "
                "it must share the policy's vocabulary"
            )
        reward = load_reward(cfg)
        shards = choose_shards(cfg, place, student, [*teachers, reference])
    if teachers and cfg.kd_signal in ("topk", "student_topk") and cfg.kd_topk > vocab_size:
        raise UserError(
            f"--kd_topk {cfg.kd_topk:,} is more than the {vocab_size:,} ids that the models share; "
            "--kd_signal full takes all of them"
        )
    if (Path(cfg.runs) / "checkpoints").is_dir():
        raise UserError(f"--runs {cfg.runs} is a run; name the folder that it is in, and a --name")
    for option, folder in (("--runs", cfg.runs), ("--kd_cache", cfg.kd_cache)):
        parallel.on_rank_0(place.rank, functools.partial(check_folder, option, folder))
    is_filled = (Path(cfg.kd_cache) / "cache.json").is_file
    unread = bool(cfg.kd_cache) and parallel.on_rank_0(place.rank, is_filled)
    job = Job(student, [] if unread else teachers, reference, place, vocab_size)
    if not cfg.micro_batch_tokens:
        cfg = dataclasses.replace(cfg, micro_batch_tokens=fitting_tokens(cfg, job, shards))
    with parallel.as_one():
        dataset = load_dataset(cfg, tokenizer, vocab_size, place.rank, reward, at_most_a_tenth)
    if at_most_a_tenth and dataset.sources and not cfg.eval_data:
        # config.json keeps the number: a resumed run has the same split
        cfg = dataclasses.replace(cfg, eval_examples=len(dataset.validation))
    if place.world > 1 and len(set(parallel.gather(dataset.digest()))) > 1:
        raise UserError(f"--data {cfg.data}: ranks read different examples; copy the files anew")
    if cfg.kd_cache and not len(dataset):
        raise UserError(
            f"--kd_cache keeps what a teacher says of all the data, and {cfg.data} is endless; "
            f"write {cfg.data}:1000"
        )
    return Plan(
        place=place,
        student=student,
        teachers=teachers,
        reference=reference,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        dataset=dataset,
        reward=reward,
        shards=shards,
        job=job.with_data(cfg, dataset),
        cfg=cfg,
        threads=choose_threads(max(c.parameters for c in (student, *teachers)), cfg.threads),
    )


def rehearse(cfg: Config, plan: Plan) -> None:
    """Call what is the user's own once, on the first row or on small numbers.

    It fails there rather than with the models loaded. Raises UserError, or what it raises.
    """
    if plan.reward:
        plan.reward.rehearse(plan.dataset.example(0), len(plan.dataset.get(0)))
    logp, ones = torch.tensor([[0.0, 1.0], [1.0, 3.0]]).log_softmax(1), torch.ones(2)
    objective = VARIANTS[cfg.grpo_variant].surrogate
    calls: list[tuple[str, Table, Callable, tuple]] = [
        ("kd_divergence", DIVERGENCES, DIVERGENCES[cfg.kd_divergence], (logp, logp, cfg.kd_beta)),
        ("grpo_variant", VARIANTS, objective, (ones, ones, -ones, ones)),
        ("grpo_advantage", ADVANTAGES, ADVANTAGES[cfg.grpo_advantage], (np.array([0.0, 1.0]),)),
    ]
    for option, table, function, given in calls:
        name = getattr(cfg, option)
        if name not in table.added:
            continue
        found = torch.as_tensor(function(*given))
        if found.shape != (2,):
            raise UserError(
                f"--{option} {name}: of two rows it returns {list(found.shape)}, not [2]"
            )
        if not found.isfinite().all():
            raise UserError(f"--{option} {name}: of two rows it returns what is not finite")


def has_teacher(cfg: Config) -> bool:
    """Whether a teacher's distribution is part of the loss."""
    return (cfg.mode == "kd" and cfg.kd_signal != "unlikely") or cfg.grpo_kd_coef > 0


def describe_checkpoints(cfg: Config) -> tuple[Checkpoint, list[Checkpoint], Checkpoint | None]:
    """The student, the teachers and the reference; none or None where the run has none."""
    teachers, reference = [], None
    if has_teacher(cfg) and not cfg.teacher and cfg.model not in ("tiny", "tiny-teacher"):
        raise UserError("--teacher is needed: the toy one only fits the toy student (--model tiny)")
    student = describe(cfg.model, "--model", read_tokenizer=not cfg.tokenizer)
    student = without_layers(student, cfg.drop_layers)
    for name in teachers_of(cfg).values() if has_teacher(cfg) else ():
        if name in SELF:
            teachers.append(student)
            continue
        teacher = describe(name or f"{RANDOM}tiny-teacher", "--teacher")
        if not name:
            teacher = dataclasses.replace(teacher, tokenizer=toy_tokenizer())
        teachers.append(teacher)
    if cfg.mode == "grpo" and cfg.grpo_kl_coef:
        reference = describe(cfg.reference, "--reference") if cfg.reference else student
    return student, teachers, reference


def choose_tokenizer(cfg: Config, student: Checkpoint, teachers: list[Checkpoint]) -> Tokenizer:
    """The user's choice, or the student's, or the first teacher's, or the toy task's."""
    if cfg.tokenizer:
        return Tokenizer.load(cfg.tokenizer)
    if student.tokenizer:
        return student.tokenizer
    if teachers and teachers[0].tokenizer:
        return teachers[0].tokenizer
    return toy_tokenizer()


def loss_vocab_size(
    cfg: Config, tokenizer: Tokenizer, student: Checkpoint, teachers: list[Checkpoint]
) -> int:
    """Head rows in the loss: the ids shared with all teachers, a policy's ids, or in SFT all."""
    if teachers:
        return min(shared_vocab_size(tokenizer, student.config, teacher) for teacher in teachers)
    if cfg.mode == "sft":
        return student.config.vocab_size
    return policy_vocab_size(tokenizer, student.config)


def load_dataset(
    cfg: Config,
    tokenizer: Tokenizer,
    vocab_size: int,
    rank: int,
    reward: Reward | None,
    at_most_a_tenth: bool,
) -> Dataset:
    """The data, every example measured; what the user should know of it is printed."""
    on_policy = cfg.mode == "grpo" or (cfg.mode == "kd" and cfg.kd_prefix != "data")
    template_kwargs = parse_template_kwargs(cfg.chat_template_kwargs)
    dataset = Dataset(
        cfg.data,
        Formatter(
            tokenizer,
            cfg.template,
            cfg.system_prompt,
            cfg.prompt_suffix,
            template_kwargs,
            cfg.teacher_prompt,
        ),
        seed=cfg.seed,
        max_tokens=cfg.micro_batch_tokens,
        vocab=vocab_size,
        eval_examples=cfg.eval_examples,
        eval_data=cfg.eval_data,
        at_most_a_tenth=at_most_a_tenth,
        train_examples=cfg.train_examples,
        max_length_policy=cfg.max_length_policy,
        bad_rows=cfg.bad_rows,
        new_tokens=cfg.sample_tokens if on_policy else 0,
        completions=not on_policy
        or (cfg.mode == "kd" and (cfg.kd_mix < 1 or cfg.kd_prefix_tokens > 0)),
        gold=reward is not None and reward.reads_gold,
        prefix_tokens=cfg.kd_prefix_tokens,
        teachers=list(teachers_of(cfg)) if has_teacher(cfg) else (),
        progress=rank == 0,
    )
    if rank == 0:
        for note in dataset.notes:
            say(f"{cfg.data}: {note}")
    return dataset


def load_reward(cfg: Config) -> Reward | None:
    """What samples earn, in grpo."""
    if cfg.mode != "grpo":
        return None
    reward = parse_reward(
        cfg.grpo_reward,
        cfg.sample_tokens,
        cfg.grpo_length_penalty,
        cfg.grpo_truncation_penalty,
        cfg.grpo_reward_seconds,
    )
    if cfg.grpo_advantage == "maxrl" and reward.may_be_negative:
        raise UserError(
            "--grpo_advantage maxrl divides by a group's mean reward, which must not be negative; "
            "leave signed parts, negative weights and penalties out"
        )
    if cfg.grpo_paced and not reward.reads_gold:
        raise UserError(
            f"--grpo_paced weighs prompts by their share of right samples; --grpo_reward "
            f"{cfg.grpo_reward} looks at no answer: add accuracy"
        )
    return reward


def number_of_steps(cfg: Config, examples: int) -> int:
    """`--steps`, or as many as `--epochs` passes over the examples take. Raises UserError."""
    prompts, passes = cfg.batch_size, 1
    if cfg.mode == "grpo":
        prompts, passes = cfg.batch_size // cfg.grpo_samples, cfg.grpo_ppo_epochs
    steps = cfg.steps or math.ceil(cfg.epochs * examples / prompts) * passes
    if steps == 0:
        raise UserError(
            "--steps 0 takes the number of steps from --epochs, but an endless task has no epochs; "
            "set --train_examples"
        )
    return steps


def load_models(cfg: Config, plan: Plan, folder: RunFolder, resume_step: int | None) -> Run:
    """Read or make all weights; the folder gets the record of what the policy is trained on."""
    place, shards, resumed = plan.place, plan.shards, None
    if resume_step is not None:
        parallel.on_rank_0(place.rank, functools.partial(folder.check, resume_step))
        resumed = folder.step_folder(resume_step)
    student, teachers, reference = with_weights(cfg, plan)
    cache = open_teacher_cache(cfg, plan, teachers[0]) if teachers and cfg.kd_cache else None
    ancestors = ancestors_of(cfg, student, teachers, reference)
    prompt_options = {name: getattr(cfg, name) for name in PROMPT_OPTIONS}
    record = functools.partial(
        training_record, cfg.data, plan.dataset, prompt_options, ancestors, resumed
    )
    trained_on = parallel.on_rank_0(place.rank, record)

    device, dtype, lora = place.device, place.compute_dtype, lora_config(cfg, student)
    policy_mesh, frozen_mesh = shards.meshes(device.type)
    make_policy = functools.partial(
        load_policy, student, resumed, lora, device, dtype, cfg.seed, policy_mesh
    )
    policy, base = make_policy()
    policy.activation_checkpointing = cfg.activation_checkpointing
    policy.decodes_in_shards = shards.in_shards(student, dtype)

    @functools.cache
    def frozen(checkpoint: Checkpoint) -> Transformer:
        if lora and base and checkpoint is student:
            return base  # the policy as it starts is the base, which is there already
        model = load_frozen(checkpoint, device, dtype, cfg.seed, frozen_mesh)
        model.decodes_in_shards = shards.in_shards(checkpoint, dtype)
        return model

    average, cost = None, {}
    if cache:
        teacher_models, cost = [], use_teacher_cache(cfg, plan, teachers[0], cache, resume_step)
    elif teachers and cfg.teacher == AVERAGE:
        average = make_policy()[0].requires_grad_(False) if policy_mesh else average_of(policy)
        teacher_models = [average]
    else:
        teacher_models = [frozen(teacher) for teacher in teachers]
    reference_model = frozen(reference) if reference else None
    if cfg.compile:
        for model in filter(None, dict.fromkeys((policy, *teacher_models, reference_model))):
            model.compile_blocks()
    return Run(
        device=device,
        rank=place.rank,
        world=place.world,
        folder=folder,
        resume_step=resume_step,
        steps=number_of_steps(cfg, len(plan.dataset)),
        tokenizer=plan.tokenizer,
        vocab_size=plan.vocab_size,
        stop_ids=stop_ids(plan.tokenizer, student.folder),
        dataset=plan.dataset,
        reward=plan.reward,
        policy=policy,
        teachers=teacher_models,
        average=average,
        teacher_folder=teachers[0].folder if len(teachers) == 1 else None,
        reference=reference_model,
        optimizer=build_optimizer(
            policy,
            cfg.lr,
            (cfg.beta1, cfg.beta2),
            cfg.eps,
            cfg.weight_decay,
            cfg.optimizer == "muon",
        ),
        trained_on=trained_on,
        weights=weights_of(student, teachers, reference),
        cost=cost,
    )


def with_weights(cfg: Config, plan: Plan) -> tuple[Checkpoint, list[Checkpoint], Checkpoint | None]:
    """The plan's student, teachers and reference; toy models, once trained, have folders."""
    student, teachers, reference = plan.student, plan.teachers, plan.reference
    if cfg.mode == "grpo" and cfg.model == "tiny":
        path = toy_model("student", STUDENT, cfg.runs, cfg.device, plan.place.rank)
        student = dataclasses.replace(student, folder=path)
    if teachers and not cfg.teacher:
        path = toy_model("teacher", TEACHER, cfg.runs, cfg.device, plan.place.rank)
        teachers = [dataclasses.replace(teachers[0], folder=path)]
    if cfg.teacher in SELF:
        teachers = [student]
    if reference and not cfg.reference:
        reference = student
    return student, teachers, reference


def lora_config(cfg: Config, student: Checkpoint) -> LoraConfig | None:
    """The adapters that are trained; None: the model itself is."""
    if not cfg.lora_rank:
        return None
    targets, base_name = parse_targets(cfg.lora_targets), peft_base_name(student)
    return LoraConfig(
        cfg.lora_rank, cfg.lora_alpha, targets, cfg.lora_dropout, cfg.lora_rslora, base_name
    )


def weights_of(
    student: Checkpoint, teachers: list[Checkpoint], reference: Checkpoint | None
) -> dict[str, str]:
    """Where the weights of each model of the run are from."""
    sources = {}
    models = {"policy": [student], "teacher": teachers, "reference": [reference]}
    for name, found in models.items():
        folders = [str(model.folder or "random") for model in found if model]
        if folders:
            sources[name] = ", ".join(folders)
    return sources


def ancestors_of(
    cfg: Config, student: Checkpoint, teachers: list[Checkpoint], reference: Checkpoint | None
) -> list[tuple[str, Path | None]]:
    """(name, folder) of every model that the policy begins from or learns from."""
    ancestors = [(cfg.model, student.folder)]
    for name, teacher in zip(teachers_of(cfg).values(), teachers, strict=False):
        if teacher.folder and teacher is not student:
            ancestors.append((name or "the toy teacher", teacher.folder))
    if cfg.reference and reference:
        ancestors.append((cfg.reference, reference.folder))
    return ancestors


def open_teacher_cache(cfg: Config, plan: Plan, teacher: Checkpoint) -> TeacherCache:
    """The folder `--kd_cache`, filled or new. Raises UserError where it cannot be used."""
    dataset = plan.dataset
    weights = f"{cfg.teacher}, random weights of seed {cfg.seed}"
    if teacher.folder:
        weights = f"{weights_digest(teacher.folder)} as {teacher.config}"
    if cfg.teacher in SELF:
        weights += f", {cfg.model} without the layers {cfg.drop_layers or '-'}"
    cache = TeacherCache(
        cfg.kd_cache,
        [dataset.get(i) for i in range(len(dataset))],
        weights,
        listed_ids(cfg),
        cfg.kd_temperature,
        plan.vocab_size,
        draws_seed=cfg.seed if cfg.kd_signal == "draws" else None,
    )
    if not cache.complete and plan.place.world > 1:
        raise UserError(
            f"--kd_cache {cfg.kd_cache} is empty; fill it by one process first (--steps 1)"
        )
    return cache


def use_teacher_cache(
    cfg: Config, plan: Plan, teacher: Checkpoint, cache: TeacherCache, resume_step: int | None
) -> dict[str, float]:
    """Give the data the teacher's top-k or draws of a cache, which is filled on first use.

    Returns what it took to fill it, whoever did it, unless the run has counted that already.
    """
    place, dataset, was_complete = plan.place, plan.dataset, cache.complete
    documents = [dataset.get(i) for i in range(len(dataset))]
    if not was_complete:
        what = "top" if cache.draws_seed is None else "draws:"
        say(
            f"keeping the teacher's {what} {cache.k} of {cache.positions:,} positions in "
            f"{cfg.kd_cache}"
        )
        model = load_frozen(teacher, place.device, place.compute_dtype, cfg.seed)
        micro_batches = consecutive([d.for_teacher() for d in documents], cfg.micro_batch_tokens)
        part = functools.partial(
            teacher_topk,
            model=model,
            k=cache.k,
            temperature=cfg.kd_temperature,
            vocab=plan.vocab_size,
            micro_batch_tokens=cfg.micro_batch_tokens,
            draws_seed=cache.draws_seed,
        )

        def rows(done: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for micro_batch in itertools.islice(micro_batches, done, None):
                yield from part(micro_batch)

        with StopSignal() as stop:
            cache.fill(rows, stop.halt, cfg.micro_batch_tokens)
    dataset.teacher_topk = cache
    if place.rank or (resume_step and was_complete):
        return {}
    lengths = [len(document.for_teacher()) for document in documents]
    with torch.device("meta"):
        model = Transformer(teacher.config)
    flops = forward_flops(model, lengths, cache.positions, plan.vocab_size)
    return {"teacher_tokens": sum(lengths), "flops": flops}
