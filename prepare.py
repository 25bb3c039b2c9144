"""What a run needs before its first step: device, tokenizers, data, models, the run's folder; and the embedded task's own models."""

import dataclasses
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import options
from config import Config, check
from data.batch import WEIGHTINGS
from data.dataset import Dataset, Stream, find_file, show_batch, task_of
from data.formatter import Formatter
from data.tasks import TASKS, Example
from data.teacher_cache import TeacherCache, weights_digest
from data.tokenizer import Tokenizer, build_tiny, parse_template_kwargs, shared_vocabulary
from errors import RunFailed, UserError, say
from kernels import backend
from model import lineage, parallel
from model.checkpoint import (
    ADAPTER,
    build_model,
    load_adapter,
    locate,
    read_config,
    stop_ids_of,
    tokenizer_folder,
)
from model.flops import forward_flops
from model.lora import LoraConfig, adapt, parse_targets
from model.optim import build_optimizer
from model.transformer import PRESETS, Transformer
from rl.logprobs import teacher_topk
from rl.reward import parse_reward
from run import RunFolder, only_one, open_run


def choose_device(cfg):
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local = parallel.init(kind)
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local} in the environment, but there are {torch.cuda.device_count()} GPUs to be seen; start fewer processes"
            )
        torch.cuda.set_device(device)
    try:
        backend.use(cfg.kernels)
    except ValueError as e:
        raise UserError(f"--kernels={cfg.kernels}: {e}") from None
    name = cfg.dtype if cfg.dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"
    return device, getattr(torch, name), rank, world


@functools.cache
def toy_tokenizer():
    examples = [
        TASKS["word_problems"].example("word_problems", "train", f"tokenizer/{i}")
        for i in range(2000)
    ]
    return build_tiny(
        "\n".join(m["role"] + "\n" + m["content"] for m in e.messages) for e in examples
    )


TEACHER = dict(
    mode="sft",
    model="tiny-teacher",
    data="word_problems",
    steps=700,
    lr=3e-3,
    batch_size=64,
    eval_every=0,
    save_every=200,
    max_checkpoints=1,
)
STUDENT = dict(mode="kd")


def embedded(cfg, rank, what, recipe, launch):
    """The folder of the embedded task's teacher or distilled student, trained on first use by the same loop, kept and shared by all runs."""
    whole = Config(**options.with_defaults(Config, recipe))
    knobs = {k: v for k, v in options.resolved(whole).items() if k not in PASSING}
    sources = [
        (Path(__file__).parent / f).read_bytes()
        for f in ("data/tasks.py", "data/tokenizer.py", "model/transformer.py")
    ]
    path = (
        Path(cfg.runs)
        / f"{what}-{hashlib.sha256(json.dumps(knobs).encode() + b''.join(sources)).hexdigest()[:8]}"
    )
    if found := parallel.on_rank_0(
        rank, functools.partial(finished_run, cfg.runs, knobs, whole.steps)
    ):
        return found
    with only_one(
        path.with_suffix(".lock"), rank, f"the embedded {what}"
    ):  # the runs of a sweep may all be the first
        if whole.steps not in parallel.broadcast(RunFolder(path).steps()):
            if rank == 0:
                say(f"training the embedded {what} first (once; kept in {path})")
            begun = parallel.broadcast((path / "config.json").exists())
            launch(
                dataclasses.replace(
                    whole, name=path.name, runs=cfg.runs, resume=begun, device=cfg.device
                )
            )
    if whole.steps not in parallel.broadcast(RunFolder(path).steps()):
        raise RunFailed(
            f"stopped before the embedded {what} was ready; the same command goes on with it"
        )
    return RunFolder(path).step_folder(whole.steps)


def finished_run(runs, knobs, steps):
    """The last checkpoint of a run that did just this, with this tokenizer: `make grpo` goes on from what `make kd` left. Or None."""
    for path in sorted(Path(runs).glob("*/config.json")):
        try:
            stored = {k: v for k, v in json.loads(path.read_text()).items() if k not in PASSING}
            last = RunFolder(path.parent).step_folder(steps)
            if (
                stored == knobs
                and (last / "tokenizer.json").read_bytes()
                == toy_tokenizer().files["tokenizer.json"]
            ):
                return last
        except (OSError, ValueError, AttributeError):
            continue  # another run's folder, or one being written
    return None


PASSING = (
    "name",
    "runs",
    "resume",
    "device",
    "kernels",
    "max_checkpoints",
    "log_every",
    "wandb",
)  # knobs that do not change what a run learns


def choose_tokenizer(cfg, folder, teacher_folder):
    if cfg.tokenizer:
        return Tokenizer.load(cfg.tokenizer)
    if folder or teacher_folder:
        return Tokenizer.load(tokenizer_folder(folder or teacher_folder))
    return toy_tokenizer()


def lora_config(cfg, folder):
    """base: the model's folder, or the hub id as the user wrote it; a preset's random weights and an adapter merged have no name for PEFT."""
    from_hub = folder and cfg.model not in PRESETS and not Path(cfg.model).is_dir()
    base = (
        ""
        if folder is None or (folder / ADAPTER).is_file()
        else cfg.model
        if from_hub
        else str(folder.resolve())
    )
    return LoraConfig(
        cfg.lora_rank,
        cfg.lora_alpha,
        parse_targets(cfg.lora_targets),
        cfg.lora_dropout,
        cfg.lora_rslora,
        base,
    )


def loss_vocabulary(cfg, tokenizer, shape, teacher_tokenizer, teacher_shape):
    """How many head rows take part in the loss: the full head for SFT, the tokenizer's ids for a policy, the shared prefix for a pair."""
    if tokenizer.size > shape.vocab_size:
        raise UserError(
            f"{tokenizer.source} has {tokenizer.size:,} ids but the model only {shape.vocab_size:,}; name another --tokenizer"
        )
    if teacher_shape is None:
        return tokenizer.size if cfg.mode == "grpo" else shape.vocab_size
    shared = (
        shared_vocabulary(tokenizer, teacher_tokenizer) if teacher_tokenizer else tokenizer.size
    )
    return min(shared, shape.vocab_size, teacher_shape.vocab_size)


COSTS = (
    "tokens",
    "sampled_tokens",
    "teacher_tokens",
    "flops",
)  # of a run so far, over all ranks; its evaluations aside

# optimizer steps that were not taken: for a gradient that was not finite, now and in a row; for one that was 0 everywhere
STEP_COUNTERS = ("skipped", "skipped_in_a_row", "no_gradient")


@dataclasses.dataclass
class Run:
    """What `prepare` makes and the loop uses."""

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
    start: int | None = (
        None  # None: from the beginning; else the step of the checkpoint that is continued
    )
    source: Iterator = None
    loss_fn: Callable = None
    counters: dict = dataclasses.field(
        default_factory=lambda: dict.fromkeys((*COSTS, *STEP_COUNTERS), 0)
    )
    cost: Counter = dataclasses.field(
        default_factory=Counter
    )  # this rank's since the last step, by the names of COSTS


def open_cache(cfg, dataset, teacher_folder, vocab, world):
    """The teacher's kept top-k for this data, whole or still empty; refused where it is of something else."""
    if not len(dataset):
        raise UserError(
            f"--kd_cache keeps what a teacher says of all the data, and {cfg.data} is endless; write {cfg.data}:1000"
        )
    teacher = (
        weights_digest(teacher_folder)
        if teacher_folder
        else f"{cfg.teacher}, random weights of seed {cfg.seed}"
    )
    cache = TeacherCache(
        cfg.kd_cache,
        [dataset.get(i) for i in range(len(dataset))],
        teacher,
        cfg.kd_topk,
        cfg.kd_temperature,
        vocab,
    )
    if world > 1 and not cache.whole:
        raise UserError(
            f"--kd_cache {cfg.kd_cache} is empty; fill it by one process first (--steps 1)"
        )
    return cache


def cost_of(cache, documents, teacher_shape, vocab):
    """What it took the teacher to fill the cache, whoever did it."""
    with torch.device("meta"):
        teacher = Transformer(teacher_shape)
    lengths = [len(d) for d in documents]
    return Counter(
        teacher_tokens=sum(lengths),
        flops=forward_flops(teacher, lengths, cache.what["positions"], vocab),
    )


PROMPT = (
    "template",
    "system_prompt",
    "prompt_suffix",
    "chat_template_kwargs",
)  # the knobs that say how questions are asked


def training_record(cfg, dataset, student_folder, teacher_folder, reference_folder, resumed):
    """The Lineage of what this run will have trained: its own examples, and what was trained on before by the models that it begins from or learns
    from. Folders are None for random weights, and where there is no such model; resumed: the checkpoint that is continued, or None.
    Of the examples all that the assistant does not say counts: the user's, the system's and tools' turns, and what the options add to every prompt.

    A note is printed where one of those models was trained on held-out questions."""
    begun_from = [(cfg.model, student_folder)]
    if teacher_folder:
        begun_from.append((cfg.teacher or "the embedded teacher", teacher_folder))
    if cfg.reference:
        begun_from.append((cfg.reference, reference_folder))
    if resumed:
        begun_from.append((str(resumed), resumed))
    before = lineage.Lineage(prompt={name: getattr(cfg, name) for name in PROMPT})
    for name, folder in begun_from:
        before += lineage.of_checkpoint(name, folder)
    examples = list(dataset.examples())
    entry = {"data": cfg.data, "sha256": None, "examples": len(examples) or None}
    if task_of(cfg.data):
        examples = []  # a task's own rule keeps what it holds out apart, and its problems are all much alike
    else:
        path = find_file(cfg.data)
        entry |= {
            "data": cfg.data
            if not Path(cfg.data).exists()
            else f"{path.resolve().parent.name}/{path.name}"
        }
        with open(path, "rb") as file:
            entry["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        if (path.parent / lineage.RECORD).exists():  # traces: of the teacher that wrote them
            before += lineage.read(path.parent, f"traces {entry['data']}")
        elif any(written_by_teacher(example) for example in examples):
            before += lineage.Lineage(unknown=(f"the teacher that wrote {entry['data']}",))
    remembered = int(before.contains([example.question for example in dataset.validation]).sum())
    if remembered:
        print(
            f"note: {remembered:,} of the {len(dataset.validation):,} held-out questions were trained on by what this run begins from",
            flush=True,
        )
    hashes = lineage.fingerprints(prompt_texts(cfg, examples))
    return before + lineage.Lineage(hashes, (entry,))


def prompt_texts(cfg: Config, examples: list[Example]) -> Iterator[str]:
    """All texts of the prompts: worked examples may stand in any of them."""
    yield cfg.system_prompt
    yield cfg.prompt_suffix
    for example in examples:
        for message in example.messages:
            if message["role"] != "assistant":
                yield message["content"] or ""


def written_by_teacher(example):
    """Whether eval.traces made this row."""
    source = example.columns.get("source")
    return isinstance(source, dict) and "teacher" in source


def load_data(cfg, tokenizer, vocab, rank):
    """(the Dataset, the Reward or None), every example measured; what a user should know of the data is printed."""
    on_policy = cfg.mode == "grpo" or (cfg.mode == "kd" and cfg.kd_prefix != "data")
    template_kwargs = parse_template_kwargs(cfg.chat_template_kwargs)
    dataset = Dataset(
        cfg.data,
        Formatter(tokenizer, cfg.template, cfg.system_prompt, cfg.prompt_suffix, template_kwargs),
        seed=cfg.seed,
        max_tokens=cfg.micro_batch_tokens,
        vocab=vocab,
        eval_examples=cfg.eval_examples,
        train_examples=cfg.train_examples,
        max_length_policy=cfg.max_length_policy,
        new_tokens=cfg.sample_tokens if on_policy else 0,
        completions=not on_policy or (cfg.mode == "kd" and cfg.kd_mix < 1),
        progress=rank == 0,
    )
    reward = None
    if cfg.mode == "grpo":
        reward = parse_reward(
            cfg.grpo_reward, cfg.sample_tokens, cfg.grpo_length_penalty, cfg.grpo_truncation_penalty
        )
        if reward.reads_gold:
            dataset.need_answers()
    if rank == 0:
        for note in dataset.notes:
            say(f"{cfg.data}: {note}")
    return dataset, reward


def prepare(cfg, held, launch):
    """Everything that can be wrong is found here, before a weight is read. Returns a Run without its source and loss, its folder locked
    until `held` (an ExitStack) is closed, or None after --show_batch. launch(cfg) trains what is missing of the embedded task's models."""
    check(cfg)
    device, compute_dtype, rank, world = choose_device(cfg)
    has_teacher, distilled = (
        cfg.mode == "kd" or cfg.grpo_kd_coef > 0,
        cfg.mode == "grpo" and cfg.model == "tiny",
    )
    own_teacher, teacher_name = has_teacher and not cfg.teacher, cfg.teacher or "tiny-teacher"
    if own_teacher and cfg.model not in ("tiny", "tiny-teacher"):
        raise UserError(
            "--teacher is needed: the embedded one only fits the embedded student (--model tiny)"
        )
    student_folder, teacher_folder = (
        locate(cfg.model, "--model"),
        locate(teacher_name, "--teacher") if has_teacher else None,
    )
    origin = locate(cfg.reference, "--reference") if cfg.reference else None
    shape = read_config(cfg.model, student_folder)
    teacher_shape = read_config(teacher_name, teacher_folder) if has_teacher else None
    tokenizer = choose_tokenizer(cfg, student_folder, teacher_folder)
    teacher_tokenizer = (
        toy_tokenizer()
        if own_teacher
        else teacher_folder and Tokenizer.load(tokenizer_folder(teacher_folder))
    )
    vocab = loss_vocabulary(cfg, tokenizer, shape, teacher_tokenizer, teacher_shape)
    dataset, reward = load_data(cfg, tokenizer, vocab, rank)
    origin = locate(cfg.reference, "--reference") if cfg.reference else student_folder
    reference_shape = (
        read_config(cfg.reference or cfg.model, origin)
        if cfg.mode == "grpo" and cfg.grpo_kl_coef
        else None
    )
    its_tokenizer = Tokenizer.load(tokenizer_folder(origin)) if reference_shape and origin else None
    if (
        reference_shape
        and loss_vocabulary(cfg, tokenizer, shape, its_tokenizer, reference_shape) < vocab
    ):
        raise UserError(
            f"--reference {cfg.reference} knows fewer of the tokenizer's {vocab:,} ids; it must share the policy's vocabulary"
        )
    if cfg.show_batch:
        batch = next(
            Stream(dataset, cfg.batch_size, cfg.seed, WEIGHTINGS[cfg.weighting], rank, world)
        )
        return show_batch(batch, tokenizer, cfg.show_batch) if rank == 0 else None
    prompts, passes = (
        (cfg.batch_size // cfg.grpo_samples, cfg.grpo_ppo_epochs)
        if cfg.mode == "grpo"
        else (cfg.batch_size, 1)
    )
    steps = cfg.steps or math.ceil(cfg.epochs * len(dataset) / prompts) * passes
    if steps == 0:
        raise UserError(
            "--steps 0 takes the number of steps from --epochs, but an endless task has no epochs; set --train_examples"
        )
    knobs = options.resolved(cfg, without=("name", "resume"))
    folder, start = held.enter_context(
        open_run(cfg.runs, cfg.name, cfg.mode, cfg.resume, cfg.max_checkpoints, knobs, rank)
    )
    student_folder = (
        embedded(cfg, rank, "student", STUDENT, launch) if distilled else student_folder
    )
    teacher_folder = (
        embedded(cfg, rank, "teacher", TEACHER, launch) if own_teacher else teacher_folder
    )
    cache = open_cache(cfg, dataset, teacher_folder, vocab, world) if cfg.kd_cache else None

    def record():
        resumed = None if start is None else folder.step_folder(start)
        folder.lineage = training_record(
            cfg, dataset, student_folder, teacher_folder, origin, resumed
        )

    parallel.on_rank_0(rank, record)

    wide = torch.float64 if compute_dtype == torch.float64 else torch.float32
    weights = student_folder if start is None or cfg.lora_rank else folder.step_folder(start)
    held_as = compute_dtype if cfg.lora_rank else wide  # what is frozen needs no master weights
    base = model = build_model(
        shape,
        weights,
        device=device,
        seed=cfg.seed,
        weight_dtype=held_as,
        compute_dtype=compute_dtype,
    )
    if cfg.lora_rank:
        model = adapt(base, lora_config(cfg, student_folder), cfg.seed, wide)
        if start is not None:  # the base is built as it was, not unmerged
            load_adapter(model, folder.step_folder(start) / "adapter")
    model.activation_checkpointing = cfg.activation_checkpointing
    frozen = lambda shape, weights: build_model(
        shape, weights, device=device, seed=cfg.seed, weight_dtype=compute_dtype
    ).requires_grad_(False)
    teacher = (
        frozen(teacher_shape, teacher_folder)
        if has_teacher and not (cache and cache.whole)
        else None
    )
    documents = [dataset.get(i) for i in range(len(dataset))] if cache else []
    if cache and not cache.whole:
        say(
            f"keeping the teacher's {cfg.kd_topk} likeliest of {cache.what['positions']:,} positions in {cfg.kd_cache}"
        )
        cache.fill(
            teacher_topk(
                documents,
                teacher,
                cfg.kd_topk,
                temperature=cfg.kd_temperature,
                vocab=vocab,
                micro_batch_tokens=cfg.micro_batch_tokens,
                device=device,
            )
        )
    dataset.listed, teacher = cache, None if cache else teacher
    origin = origin if cfg.reference else student_folder
    reference = None
    if reference_shape:  # with LoRA the policy as it starts is the base, which is there already
        reference = base if cfg.lora_rank and not cfg.reference else frozen(reference_shape, origin)
    if cfg.compile:
        for block in (block for m in (model, teacher, reference) if m for block in m.layers):
            block.compile_halves()
    optimizer = build_optimizer(model, cfg.lr, (cfg.beta1, cfg.beta2), cfg.eps, cfg.weight_decay)
    stop_ids = list(dict.fromkeys([*tokenizer.stop_ids(), *stop_ids_of(student_folder)]))
    run = Run(
        device,
        rank,
        world,
        folder,
        tokenizer,
        dataset,
        stop_ids,
        vocab,
        steps,
        model,
        teacher,
        teacher_folder,
        reference,
        reward,
        optimizer,
        start,
    )
    if cache and not start and rank == 0:
        run.cost = cost_of(cache, documents, teacher_shape, vocab)
    return run
