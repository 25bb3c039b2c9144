"""What a run takes in a GPU's memory, by formulas: before any weight is read.

`needs` lists the parts, `check` refuses what cannot fit and names the option that would mend it,
`fitting_tokens` is `--micro_batch_tokens auto`. The formulas are upper bounds of what
`tests/test_memory.py` counts.

Shapes: T packed tokens, D hidden, V vocabulary, I intermediate, E head dimension.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from config import AVERAGE, Config
from data.dataset import Dataset
from errors import UserError
from kernels import backend
from kernels.attention import FEW_SCORES
from kernels.chunk import BLOCK_ELEMENTS, CHUNK_ELEMENTS
from model import parallel
from model.generate import KEPT_BYTES
from model.kv_cache import CAPACITY
from model.load import Checkpoint
from model.lora import parse_targets
from model.optim import STACKED_ELEMENTS
from model.sharding import make_mesh
from model.transformer import ModelConfig, Transformer

LOOKED_AT = 64  # problems of an endless task
OF_CUDA = 1.2e9  # its context, cuBLAS's workspaces, what NCCL keeps
SURE = 0.9  # of what the formulas say is needed for certain
FRAGMENTS = 1.05  # of the allocator's memory, what is free in pieces that are too small
LEAST_TOKENS, MOST_TOKENS = 512, 1 << 16  # what "auto" chooses between


class Shards(NamedTuple):
    """Which models are split over the ranks, and how many neighbouring ranks share one.

    largest_copy: Bytes of a whole copy that is gathered to generate with; a model that takes more
    generates in shards.
    """

    ranks: int
    policy: bool
    frozen: bool
    largest_copy: float = math.inf

    def in_shards(self, checkpoint: Checkpoint, dtype: torch.dtype) -> bool:
        """Whether a model, if it is split, generates as it is."""
        return checkpoint.parameters * dtype.itemsize > self.largest_copy

    def meshes(self, device_type: str) -> tuple[Any, Any]:
        """Of the policy and of the frozen models; None for what every rank holds whole."""
        if not (self.policy or self.frozen):
            return None, None
        mesh = make_mesh(self.ranks, device_type)
        return (mesh if self.policy else None), (mesh if self.frozen else None)


def device_bytes(cfg: Config, device: torch.device) -> float:
    """The memory of a GPU, or what --memory_gb says; infinite on a CPU."""
    if cfg.memory_gb:
        return cfg.memory_gb * 1e9
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return math.inf


def choose_shards(
    cfg: Config, place: parallel.Device, student: Checkpoint, frozen: Sequence[Checkpoint | None]
) -> Shards:
    """What --shard and its kin come to. Raises UserError."""
    options = {"shard": cfg.shard, "shard_frozen": cfg.shard_frozen}
    if place.world == 1:
        for name, value in options.items():
            if value == "on":
                raise UserError(
                    f"--{name} on: this is one process; start several with torchrun, or set "
                    f"--{name} auto"
                )
        return Shards(1, False, False)
    itemsize = place.compute_dtype.itemsize
    # fp32 weights, gradients and two moments; adapters are small beside their frozen base
    policy_bytes = student.parameters * (itemsize if cfg.lora_rank else 16)
    others = {c for c in frozen if c and not (c is student and cfg.lora_rank)}
    needs = {"shard": policy_bytes, "shard_frozen": sum(c.parameters for c in others) * itemsize}
    room = device_bytes(cfg, place.device) / 3
    chosen = [v == "on" or (v == "auto" and needs[name] > room) for name, v in options.items()]
    local = parallel.place().local_world
    ranks = cfg.shard_ranks or (local if local > 1 else place.world)
    if any(chosen) and (ranks == 1 or place.world % ranks):
        raise UserError(
            f"--shard_ranks {ranks}: {place.world} ranks are no groups of {ranks}; choose a divisor"
        )
    largest_copy = {"on": 0, "off": math.inf, "auto": room}[cfg.shard_rollouts]
    return Shards(ranks, chosen[0], chosen[1], largest_copy)


# --- one model ------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Parameters of a model: of all blocks, of one, around them, of the adapters on them."""

    blocks: int
    block: int
    around: int
    adapters: int


@functools.cache
def size_of(config: ModelConfig, rank: int = 0, targets: tuple[str, ...] = ()) -> Size:
    with torch.device("meta"):
        model = Transformer(config)
    adapters = 0
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            adapters += rank * (layer.in_features + layer.out_features)
    blocks = sum(p.numel() for p in model.layers.parameters())
    around = sum(p.numel() for p in model.parameters()) - blocks
    return Size(blocks, blocks // config.num_layers, around, adapters)


def saved_per_token(config: ModelConfig, itemsize: int, cuda: bool) -> int:
    """Bytes that a block keeps of each token for its backward pass.

    A norm keeps its input, and what reads it its output; attention its queries, keys, values and
    output (on a CPU they are copied into blocks first); the MLP gate, up and their product.
    """
    norm = 2 * itemsize
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    norms = (4 if config.sandwich_norms else 2) * norm * config.hidden_size
    if not cuda:
        heads += (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    if config.qk_norm:
        norms += norm * (config.num_heads + config.num_kv_heads) * config.head_dim
    return norms + itemsize * (heads + 3 * config.intermediate_size) + 4 * config.num_heads


def kept_slots(config: ModelConfig, rows: int, slots: int, itemsize: int) -> int:
    """Bytes of a key-value cache with so many slots a row, in whole CAPACITY."""
    vectors = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return vectors * rows * -(-slots // CAPACITY) * CAPACITY * itemsize


# --- a run ----------------------------------------------------------------------------------------


def samples(cfg: Config) -> bool:
    """Whether a run has rollouts."""
    return cfg.mode == "grpo" or cfg.kd_prefix != "data"


@dataclasses.dataclass(frozen=True)
class Job:
    """What `needs` reads of a run beside its options: models, place, and what is generated.

    teachers: Those whose weights are read. rows, slots: Of the key-value cache of validation, per
    rank; 0: nothing is generated. longest: Tokens of the longest document
    with what is generated. seen: The most tokens that a rank has for one micro-batch.
    """

    student: Checkpoint
    teachers: Sequence[Checkpoint]
    reference: Checkpoint | None
    place: parallel.Device
    vocab: int
    rows: int = 1
    slots: int = CAPACITY
    longest: int = LEAST_TOKENS
    seen: float = math.inf

    def with_data(self, cfg: Config, dataset: Dataset) -> "Job":
        """This job with the lengths of its data; of an endless task those of its first problems."""
        number, world = len(dataset) or LOOKED_AT, self.place.world
        documents = [dataset.get(i) for i in range(number)] + dataset.validation_documents()
        longest = max(max(len(d), len(d.for_teacher())) for d in documents)
        prompt = longest if cfg.mode == "grpo" else max(d.completion_start for d in documents)
        rows = min(256, -(-len(dataset.validation) // world)) if cfg.eval_examples else 0
        slots = prompt + cfg.eval_tokens if rows else 0
        if samples(cfg):
            longest += cfg.sample_tokens
        seen = -(-cfg.batch_size // world) * longest
        return dataclasses.replace(self, rows=rows, slots=slots, longest=longest, seen=seen)


def needs(cfg: Config, job: Job, shards: Shards, tokens: int) -> dict[str, float]:
    """Bytes of each part on a GPU, for micro-batches of `tokens`."""
    tokens = int(min(tokens, job.seen))
    parts = _trained(cfg, job, shards)
    parts |= _frozen(cfg, job, shards, parts["gradients"], tokens)
    parts |= _copies(cfg, job, shards)
    parts |= _activations(cfg, job, shards, tokens)
    parts |= _head(cfg, job, shards, tokens)
    return parts | _caches(cfg, job)


def _itemsizes(job: Job) -> tuple[int, int]:
    """Bytes of a number that is computed with, and of one that is summed or updated."""
    itemsize = job.place.compute_dtype.itemsize
    return itemsize, max(itemsize, 4)


def _trained(cfg: Config, job: Job, shards: Shards) -> dict[str, float]:
    """The policy with its gradients and moments, and what is whole for a while."""
    c, m = _itemsizes(job)
    config = job.student.config
    size = size_of(config, cfg.lora_rank, parse_targets(cfg.lora_targets))
    base = size.blocks + size.around
    trained = size.adapters or base
    frozen = c * base if size.adapters else 0
    split = shards.ranks if shards.policy else 1
    muon = cfg.optimizer == "muon"
    # of a block all but norms and biases is matrices
    states = 2 * trained - muon * (size.adapters or size.blocks)
    parts = {
        "weights": (frozen + m * trained) / split,
        "gradients": m * trained / split,
        "optimizer": m * states / split,
    }
    if muon:  # matrices that are orthogonalized together, two later forms, and two squares
        width = cfg.lora_rank or config.hidden_size
        largest = config.intermediate_size * width
        stacked = min(trained, max(STACKED_ELEMENTS, largest))
        itemsize = 2 if job.place.device.type == "cuda" else m
        parts["Muon at work"] = m * largest + 5 * itemsize * stacked
    if shards.policy:  # whole, and what is to be summed of its gradient
        parts["around the blocks"] = (c if size.adapters else 2 * m) * size.around
    elif job.place.world > 1:  # what is summed at a time, in a copy
        largest = parallel.BUCKET_ELEMENTS + config.vocab_size * config.hidden_size
        parts["sum over ranks"] = m * min(trained, largest)
    return parts


def _frozen(cfg: Config, job: Job, shards: Shards, trained: float, tokens: int) -> dict[str, float]:
    """Teachers and reference; trained: bytes that a rank holds of what is trained."""
    c, parts = job.place.compute_dtype.itemsize, {}
    others = [] if cfg.teacher == AVERAGE else [*job.teachers]
    if cfg.teacher == AVERAGE and job.teachers:
        parts["moving average"] = trained
        if shards.policy:
            own = size_of(job.student.config)
            base = c * (own.blocks + own.around) / shards.ranks if cfg.lora_rank else 0
            whole = c if cfg.lora_rank else max(c, 4)
            parts["moving average"] += base + whole * own.around
    if job.reference:
        others.append(job.reference)
    for model in {id(o): o for o in others}.values():
        if model is job.student and cfg.lora_rank and not shards.policy:
            continue  # the base itself
        own = size_of(model.config)
        name = "reference" if model is job.reference else "teacher"
        held = c * (own.blocks + own.around)
        at_work = 4 * tokens * c * model.config.intermediate_size
        if shards.frozen:
            held = held / shards.ranks + c * own.around
            at_work += 2 * c * own.block
        parts[name] = parts.get(name, 0) + held
        parts["a teacher at work"] = max(parts.get("a teacher at work", 0), at_work)
    return parts


def _copies(cfg: Config, job: Job, shards: Shards) -> dict[str, float]:
    """What generation reads beside the weights: a copy, or of a model in shards perhaps the head.

    That of rollouts stays; validation makes its own, and lets it go.
    """
    dtype, cuda = job.place.compute_dtype, job.place.device.type == "cuda"

    def copy_of(model: Checkpoint, split: bool, trained: bool) -> float:
        config, own = model.config, size_of(model.config)
        if split and shards.in_shards(model, dtype):
            return dtype.itemsize * config.vocab_size * config.hidden_size
        if not split and not (trained and (cfg.lora_rank or dtype.itemsize < 4 or cuda)):
            return 0
        shared = own.around if trained and cfg.lora_rank and not split else 0
        return dtype.itemsize * (own.blocks + own.around - shared)

    policy = copy_of(job.student, shards.policy, True)
    teachers = max([copy_of(t, shards.frozen, False) for t in job.teachers], default=0)
    copies = {
        "copy for rollouts": teachers if cfg.kd_prefix == "teacher" else policy,
        "copy for validation": max(policy, teachers) if job.rows else 0,
    }
    if not samples(cfg):
        del copies["copy for rollouts"]
    return {name: size for name, size in copies.items() if size}


def _activations(cfg: Config, job: Job, shards: Shards, tokens: int) -> dict[str, float]:
    """What the blocks keep for their backward pass, and what one takes while it computes."""
    c, m = _itemsizes(job)
    config, cuda = job.student.config, job.place.device.type == "cuda"
    block = size_of(config).block
    saved = tokens * saved_per_token(config, c, cuda)
    if not cuda and config.num_heads * job.longest**2 <= FEW_SCORES:
        saved += tokens * c * config.num_heads * job.longest  # the probabilities of attention
    if m > c and not cfg.lora_rank and not shards.policy:
        saved += c * block  # its weights in the compute dtype
    carried = tokens * config.hidden_size * c
    at_work = tokens * c * 4 * config.intermediate_size
    if shards.policy:  # a block and the next one, gathered
        at_work += (3 * c if cfg.lora_rank else 2 * c + m) * block
    kept = saved
    if cfg.activation_checkpointing:
        kept, at_work = carried, at_work + saved
    return {"activations": config.num_layers * kept + 3 * carried, "a block at work": at_work}


def _head(cfg: Config, job: Job, shards: Shards, tokens: int) -> dict[str, float]:
    """The rows and the gradient of the head, and the logits of a chunk."""
    c, m = _itemsizes(job)
    config, cuda = job.student.config, job.place.device.type == "cuda"
    hidden = config.hidden_size + sum(teacher.config.hidden_size for teacher in job.teachers)
    head = job.vocab * config.hidden_size
    rows = m * tokens * hidden
    if not (cfg.lora_rank or shards.policy):  # else it has none, or it is around the blocks
        rows += m * head
    chunk = min(tokens * job.vocab, CHUNK_ELEMENTS["cuda" if cuda else "cpu"])
    logits = m * chunk * (1 + bool(job.teachers))
    if c < m:  # the head is cast; without tensor cores back again
        logits += c * chunk + c * head * (not cfg.lora_rank) + m * head * (not cuda)
    if not backend.triton_serves(job.place.device):
        block = chunk if cuda else min(chunk, BLOCK_ELEMENTS // (1 + bool(job.teachers)))
        logits += m * block * (6 if job.teachers else 1)
    return {"head": rows, "logits": logits}


def _caches(cfg: Config, job: Job) -> dict[str, float]:
    """The key-value cache of validation, and that of rollouts, which stays if it is small."""
    config, c = job.student.config, job.place.compute_dtype.itemsize
    parts: dict[str, float] = {"KV cache": kept_slots(config, job.rows, job.slots, c)}
    if samples(cfg):
        rows = min(cfg.sample_batch, -(-cfg.batch_size // job.place.world))
        cache = kept_slots(config, rows, max(job.longest, cfg.sample_tokens), c)
        if cache > KEPT_BYTES:
            parts["KV cache"] = max(cache, parts["KV cache"])
        elif cache:
            parts["cache of rollouts"] = cache
    return parts


STEP = ("gradients", "around the blocks")
APART = ("a teacher at work", "sum over ranks", "Muon at work")  # before and after the student
OF_THE_STUDENT = ("activations", "head")
IN_TURN = ("logits", "a block at work")  # never at the same time
GENERATION = ("KV cache", "copy for validation")


def peak(parts: dict[str, float], on_cuda: bool) -> float:
    """The most at a time: the larger of a training step and of generation.

    On a GPU generation takes what is there: with a smaller cache fewer rows run at a time.
    """
    passing = (*STEP, *APART, *OF_THE_STUDENT, *IN_TURN, *GENERATION)
    standing = sum(size for name, size in parts.items() if name not in passing)
    student = sum(parts[name] for name in OF_THE_STUDENT) + max(parts[name] for name in IN_TURN)
    step = sum(parts.get(name, 0) for name in STEP)
    step += max(student, *(parts.get(name, 0) for name in APART))
    generation = parts.get("copy for validation", 0)
    if on_cuda:
        return (standing + max(step, generation)) * FRAGMENTS + OF_CUDA
    return standing + max(step, generation + parts["KV cache"])


def fitting_tokens(cfg: Config, job: Job, shards: Shards) -> int:
    """The largest micro-batch that fits; the default on a device whose memory is not known."""
    room, tokens = room_of(cfg, job), LEAST_TOKENS
    if room == math.inf:
        return 8192
    while tokens < MOST_TOKENS and predicted(cfg, job, shards, 2 * tokens) <= room:
        tokens *= 2
    step = tokens // 8
    while tokens < MOST_TOKENS and predicted(cfg, job, shards, tokens + step) <= room:
        tokens += step
    return tokens


def predicted(cfg: Config, job: Job, shards: Shards, tokens: int) -> float:
    return peak(needs(cfg, job, shards, tokens), job.place.device.type == "cuda")


def room_of(cfg: Config, job: Job) -> float:
    """The memory of the smallest of the ranks' GPUs."""
    return min(parallel.gather(device_bytes(cfg, job.place.device)))


def check(
    cfg: Config, job: Job, shards: Shards, room: float, shown: Callable[[float], str]
) -> None:
    """Refuse a run that needs more than there is. Raises UserError, with what would mend it."""
    need = predicted(cfg, job, shards, cfg.micro_batch_tokens)
    if SURE * need <= room:
        return
    smaller = max(job.longest, LEAST_TOKENS)  # no document is cut
    changes: list[dict[str, Any]] = [
        {"micro_batch_tokens": smaller},
        {"activation_checkpointing": True},
        {"sample_batch": 16},
        {"shard_frozen": "on"},
        {"shard": "on"},
        {"lora_rank": 16},
    ]
    every: dict[str, Any] = {}
    for change in changes:
        ((name, value),) = change.items()
        if name.startswith("shard") and job.place.world == 1:
            continue
        if name == "sample_batch" and not samples(cfg):
            continue
        if name == "lora_rank" and (cfg.resume or cfg.lora_rank):
            continue
        for tried in (change, every | change):
            other = dataclasses.replace(cfg, **tried)
            frozen = [*job.teachers, job.reference]
            split = choose_shards(other, job.place, job.student, frozen)
            needed = predicted(other, job, split, other.micro_batch_tokens)
            if tried == change and needed >= need:
                break  # it does nothing here
            if needed <= room:
                if name == "micro_batch_tokens":
                    value = fitting_tokens(other, job, split)
                    tried = tried | {name: max(value, smaller)}
                words = " ".join(f"--{n} {v}" for n, v in tried.items())
                raise UserError(f"{_short(need, room, shown)}; set {words}")
        else:
            every |= change
    raise UserError(f"{_short(need, room, shown)}; take a smaller model, or more GPUs")


def _short(need: float, room: float, shown: Callable[[float], str]) -> str:
    return f"this run needs about {shown(need)} on a GPU of {shown(room)} (or say --memory_gb)"
