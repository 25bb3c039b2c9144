"""The formulas of memory.py beside what is counted on a CPU, and what they refuse."""

import ctypes
import dataclasses
import functools
import os
import platform
import re
import tempfile
from typing import Any

import numpy as np
import pytest
import torch

import memory
import train
from config import Config
from data.batch import Document, GlobalBatch
from errors import UserError
from losses.kd import KDConfig, kd_loss
from losses.sft import sft_loss
from model import lora, parallel, sharding
from model.generate import Engine, generate
from model.kv_cache import KVCache
from model.load import Checkpoint, load_frozen, load_policy
from model.optim import average_of, build_optimizer, clip_gradients, update_average
from model.transformer import ModelConfig
from overview import bytes_of
from rl.logprobs import add_logprobs
from rl.sample import RolloutConfig
from tests import distributed_workers as workers
from tests.test_train import SMALL

SHAPE = ModelConfig(
    vocab_size=4000,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
WIDE = dataclasses.replace(SHAPE, hidden_size=256, intermediate_size=1024, vocab_size=1500)
TEACHER = dataclasses.replace(SHAPE, hidden_size=192, num_layers=2)


def named(shape):
    return Checkpoint("", None, shape, None)


def place(dtype=torch.float32, device="cpu", world=1):
    return parallel.Device(torch.device(device), dtype, 0, world)


def allocations(call):
    """(call(), bytes of CPU memory that tensors hold more after it, the most in between)."""
    profile: Any = torch.autograd.profiler.profile(profile_memory=True)
    with profile:
        result = call()
    now = most = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return result, now, most


CASES = {
    "sft": ({}, SHAPE, 768),
    "sft, wide": ({}, WIDE, 512),
    "sft, recomputed": ({"activation_checkpointing": True}, SHAPE, 512),
    "sft, adapters": ({"lora_rank": 8}, WIDE, 512),
    "kd": ({"mode": "kd"}, SHAPE, 1024),
    "kd, a small batch": ({"mode": "kd"}, WIDE, 128),
    "sft, long": ({}, SHAPE, 1024, 256),  # attention keeps its probabilities
    "kd, long": ({"mode": "kd"}, SHAPE, 1024, 256),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_the_formulas_say(case):
    options, shape, tokens, *given = CASES[case]
    (length,) = given or [64]
    cfg = Config(**{"mode": "sft", "optimizer": "adamw"} | options)
    adapters = lora.LoraConfig(8, 32.0) if cfg.lora_rank else None
    device = torch.device("cpu")
    policy, _ = load_policy(named(shape), None, adapters, device, torch.float32, 0)
    policy.activation_checkpointing = cfg.activation_checkpointing
    frozen, loss = [], sft_loss
    if cfg.mode == "kd":
        frozen = [load_frozen(named(TEACHER), device, torch.float32, 1)]
        kd = KDConfig("forward_kl", vocab=1500)
        loss = functools.partial(kd_loss, cfg=kd)
    rng = np.random.default_rng(0)
    docs = [
        Document(rng.integers(0, 1500, length).astype(np.int32), np.ones(length))
        for _ in range(2 * tokens // length)
    ]

    def step(documents):
        batch = GlobalBatch(documents)
        train.forward_backward(policy, frozen, loss, batch, 1.0, tokens, device)

    step(docs[:1])  # what is made once
    policy.zero_grad()
    _, _, counted = allocations(lambda: step(docs))
    vocab = 1500 if frozen else shape.vocab_size
    models = named(shape), [named(TEACHER)] * len(frozen), None
    job = memory.Job(*models, place(), vocab, longest=length)
    parts = memory.needs(cfg, job, memory.Shards(1, False, False), tokens)
    there = ("weights", "teacher", "optimizer")  # before the step
    said = memory.peak(parts, False) - sum(parts.get(name, 0) for name in there)
    print(f"{case}: counted {counted / 1e6:.1f} MB, said {said / 1e6:.1f} MB, {said / counted:.2f}")
    assert 0.95 < said / counted < 1.3


# --- on several ranks -----------------------------------------------------------------------------

# 30 million parameters, and 48 million: what is counted is models, not activations
LARGER = dataclasses.replace(SHAPE, hidden_size=512, intermediate_size=2048, num_layers=6)
LARGER = dataclasses.replace(LARGER, num_heads=8, num_kv_heads=4, head_dim=64, vocab_size=12000)
ITS_TEACHER = dataclasses.replace(LARGER, hidden_size=640, intermediate_size=2560, num_layers=7)
BUFFERS = 12e6
SAMPLING = RolloutConfig(1, lambda document: document, 1, [], 12000)
ON_RANKS = {
    "sft": {},
    "sft, bf16": {"dtype": "bfloat16"},
    "sft, Muon": {"optimizer": "muon"},
    "adapters": {"lora_rank": 8},
    "adapters, bf16": {"lora_rank": 8, "dtype": "bfloat16"},
    "kd": {"mode": "kd"},
    "kd, bf16": {"mode": "kd", "dtype": "bfloat16"},
    "its own average": {"mode": "kd", "teacher": "self_average"},
    "its average, adapters": {"mode": "kd", "teacher": "self_average", "lora_rank": 8},
    "rollouts": {"mode": "kd", "kd_prefix": "student"},
    "rollouts in shards": {"mode": "kd", "kd_prefix": "student", "shard_rollouts": "on"},
    "reference": {"mode": "grpo", "grpo_kl_coef": 0.1},
}


# ranks, how many hold a model together (0: none), what they run
RUNS = [
    (world, ranks, case)
    for world, ranks in [(1, 0), (2, 2), (4, 4), (4, 2), (2, 0)]
    for case, options in ON_RANKS.items()
    if ranks or "shard_rollouts" not in options
]


def held_bytes(tensors):
    storages = [sharding.local(x).untyped_storage() for x in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Mallinfo2(ctypes.Structure):
    """What glibc's mallinfo2 returns; hblkhd: bytes of the blocks that are mapped one by one."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks")]
    _fields_ += [("hblkhd", ctypes.c_size_t), ("others", 5 * ctypes.c_size_t)]


class Mapped:
    """Counts this process's large blocks of memory, whichever thread takes or frees them.

    The profiler's count misses what gloo's threads free. glibc itself keeps the largest sum of the
    blocks that it maps one by one, which are all of 128 KiB and more once that limit is set.
    """

    def __init__(self):
        self.c = ctypes.CDLL(None)
        self.c.mallinfo2.restype = Mallinfo2
        self.c.mallopt(ctypes.c_int(-3), ctypes.c_int(1 << 17))  # M_MMAP_THRESHOLD
        self.before = self.now()

    def now(self):
        return self.c.mallinfo2().hblkhd

    def most(self):
        """The most bytes at a time since the process began, above those at the start of this."""
        with tempfile.TemporaryFile() as said:
            stderr = os.dup(2)
            os.dup2(said.fileno(), 2)
            self.c.malloc_stats()
            os.dup2(stderr, 2)
            os.close(stderr)
            said.seek(0)
            (most,) = re.findall(rb"max mmap bytes\s*=\s*(\d+)", said.read())
        return int(most) - self.before


class Life:
    """Two steps of a run, each with a rollout after it if it has some."""

    def __init__(self, cfg, world, ranks):
        self.cfg, self.tokens = cfg, 64
        device, dtype = torch.device("cpu"), getattr(torch, cfg.dtype.replace("auto", "float32"))
        student, teacher = named(LARGER), named(ITS_TEACHER)
        mesh = sharding.make_mesh(ranks, "cpu") if ranks else None
        largest_copy = 0 if cfg.shard_rollouts == "on" else 1e18
        shards = memory.Shards(max(ranks, 1), bool(ranks), bool(ranks), largest_copy)
        adapters = lora.LoraConfig(8, 32.0) if cfg.lora_rank else None
        make = functools.partial(load_policy, student, None, adapters, device, dtype, 0, mesh)
        follows = cfg.teacher == "self_average"
        self.policy, _ = make()
        self.policy.decodes_in_shards = shards.in_shards(student, dtype)
        self.engine, self.average, self.frozen = Engine(self.policy), None, []
        if follows:
            self.average = make()[0].requires_grad_(False) if ranks else average_of(self.policy)
            self.frozen = [self.average]
        elif cfg.mode != "sft":
            self.frozen = [load_frozen(teacher, device, dtype, 0, mesh)]
        muon = cfg.optimizer == "muon"
        self.optimizer = build_optimizer(self.policy, 1e-4, (0.9, 0.95), 1e-8, 0.0, muon)
        self.loss = sft_loss
        if cfg.mode == "kd":
            self.loss = functools.partial(kd_loss, cfg=KDConfig("forward_kl", vocab=12000))
        for _ in range(2):
            self.step()
            if memory.samples(cfg):
                self.rollout()
        models = [] if cfg.mode == "sft" else [student if follows else teacher]
        at = place(dtype, world=world)
        job = memory.Job(student, models, None, at, 12000, 0, longest=0)
        if cfg.mode == "grpo":
            job = memory.Job(student, [], models[0], at, 12000, 0, longest=0)
        self.parts = memory.needs(cfg, job, shards, self.tokens)

    def step(self):
        rng = np.random.default_rng(0)
        docs = [
            Document(rng.integers(0, 12000, 32).astype(np.int32), np.ones(32)) for _ in range(4)
        ]
        device, teachers = torch.device("cpu"), self.frozen
        if self.cfg.mode == "grpo":  # its loss is not what is counted here
            add_logprobs(GlobalBatch(docs), "ref_logp", teachers[0], SAMPLING)
            teachers = []
        train.forward_backward(
            self.policy, teachers, self.loss, GlobalBatch(docs), 1.0, self.tokens, device
        )
        parallel.sync_gradients(self.policy)
        clip_gradients(self.policy, 1.0)
        self.optimizer.step()
        if self.average:
            update_average(self.average, self.policy, 0.9)
        self.optimizer.zero_grad()

    def rollout(self):
        generate(
            self.engine, [[1, 2, 3]] * 8, 2, [], vocab=12000, temperature=1.0, seeds=[*range(8)]
        )


def life_main(rank, world, port, case, ranks, results):
    """Rank 0 puts what the run of a case held at most, its parts, and what was said of them."""
    workers.setup(world, rank, port, 300)
    mapped = Mapped()
    cfg = Config(**{"mode": "sft", "sample_batch": 1, "optimizer": "adamw"} | ON_RANKS[case])
    life = Life(cfg, world, ranks)
    most = mapped.most()
    parallel.barrier()  # what was whole is in shards
    held = {"weights": held_bytes(life.policy.parameters())}
    states = [x for state in life.optimizer.state.values() for x in state.values()]
    held["optimizer"] = held_bytes(x for x in states if x.dim())
    if rank == 0:
        results.put((most, life.parts, held))
    parallel.barrier()
    parallel.close()


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc counts what is held")
@pytest.mark.parametrize("world, ranks, case", RUNS)
def test_ranks_take_what_the_formulas_say(world, ranks, case):
    """A run at the most: weights, states, copies, shards and all.

    On a CPU gloo sums a copy of the gradient, and libraries have buffers (packed matrices).
    """
    counted, parts, held = workers.spawned(life_main, world, case, ranks)
    ratio = memory.peak(parts, False) / counted
    listed = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts.items())
    print(f"{world} ranks, {ranks} together, {case}: {counted / 1e6:.0f} MB,", end=" ")
    print(f"said {ratio:.2f} times as much: {listed}")
    for name, size in held.items():
        assert parts[name] == pytest.approx(size, rel=0.01), (case, name)
    own = BUFFERS  # and gloo's copy
    if ranks and not ON_RANKS[case].get("lora_rank"):
        own += parts["around the blocks"] / 2
    assert 0.95 * counted - own < memory.peak(parts, False) < 1.1 * counted


def run_of(cfg, world=1, shape=SHAPE, gb=0.0, teacher=TEACHER, **options):
    """(options, job, shards) of a run on GPUs of so many GB, in bf16, with AdamW."""
    cfg = dataclasses.replace(cfg, memory_gb=gb, **{"optimizer": "adamw"} | options)
    at = place(torch.bfloat16, world=world)
    frozen = [named(teacher)] if cfg.mode == "kd" else []
    job = memory.Job(named(shape), frozen, None, at, shape.vocab_size, 64, 512, 900)
    return cfg, job, memory.choose_shards(cfg, at, job.student, frozen)


LARGE = ModelConfig(
    vocab_size=151936,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    head_dim=128,
    tie_word_embeddings=False,
)


KEPT = ("shape", "teacher", "mode")


@pytest.mark.parametrize(
    "gb, world, options, words",
    [
        (0.02, 1, {}, "take a smaller model"),
        (1, 1, {"micro_batch_tokens": 1 << 16}, "set --micro_batch_tokens [0-9]+$"),
        (64, 8, {"shape": LARGE, "shard": "off"}, "set --.*--shard on$"),
        (80, 1, {"shape": LARGE}, "set --lora_rank 16$"),
        # nothing is suggested that does nothing here: no frozen model, the base's adapters kept
        (64, 8, {"shape": LARGE, "shard": "off", "shard_frozen": "off"}, "True --shard on$"),
        (80, 1, {"shape": LARGE, "name": "r", "resume": True}, "take a smaller model"),
        (12, 8, {"teacher": LARGE, "mode": "kd", "shard_frozen": "off"}, "set --shard_frozen on$"),
    ],
)
def test_what_cannot_fit_is_refused_with_what_would_mend_it(gb, world, options, words):
    cfg, job, shards = run_of(Config(mode="sft"), world, gb=gb, **options)
    with pytest.raises(UserError, match=words) as e:
        memory.check(cfg, job, shards, gb * 1e9, bytes_of)
    assert f"GPU of {bytes_of(gb * 1e9)}" in str(e.value)
    said = str(e.value).partition("; set ")[2].split()
    mended = {}
    for name, value in zip(said[::2], said[1::2], strict=True):
        field = Config.__dataclass_fields__[name[2:]]
        mended[name[2:]] = value if name.startswith("--shard") else type(field.default)(eval(value))
    if mended:  # with them it fits
        options = {name: v for name, v in options.items() if name in KEPT} | mended
        cfg, job, shards = run_of(Config(mode="sft"), world, gb=gb, **options)
        memory.check(cfg, job, shards, gb * 1e9, bytes_of)


def test_a_cache_is_as_large_as_the_formula_says():
    policy, _ = load_policy(named(SHAPE), None, None, torch.device("cpu"), torch.float32, 0)
    assert KVCache(policy, 5, 512, 512).nbytes == memory.kept_slots(SHAPE, 5, 400, 4)


def test_rollouts_keep_their_copy_and_cache_and_validation_does_not():
    cfg, job, shards = run_of(Config(mode="sft"))
    parts = memory.needs(cfg, job, shards, 4096)
    copy = 2 * job.student.parameters
    assert parts["copy for validation"] == copy and "copy for rollouts" not in parts
    without = {name: size for name, size in parts.items() if name != "copy for validation"}
    assert memory.peak(parts, True) == memory.peak(without, True)
    cfg = Config(mode="kd", kd_prefix="student", sample_batch=8)
    job = dataclasses.replace(job, longest=1000)
    parts = memory.needs(cfg, job, shards, 4096)
    cache = memory.kept_slots(SHAPE, 8, 1000, 2)
    assert (parts["copy for rollouts"], parts["cache of rollouts"]) == (copy, cache)
    less = {**parts, "copy for rollouts": 0, "cache of rollouts": 0}
    more = memory.peak(parts, True) - memory.peak(less, True)
    assert more == pytest.approx(memory.FRAGMENTS * (copy + cache))
    too_large = dataclasses.replace(job, longest=1 << 30)
    parts = memory.needs(cfg, too_large, shards, 4096)
    assert "cache of rollouts" not in parts and parts["KV cache"] > memory.KEPT_BYTES


def test_a_teacher_may_take_more_than_the_student_whose_turn_is_next():
    wide = dataclasses.replace(TEACHER, intermediate_size=1 << 17)
    cfg, job, shards = run_of(Config(mode="kd"), teacher=wide)
    parts = memory.needs(cfg, job, shards, 4096)
    assert parts["a teacher at work"] == 4 * 4096 * 2 * (1 << 17)
    stays = sum(parts[name] for name in ("weights", "gradients", "optimizer", "teacher"))
    most = (stays + parts["a teacher at work"]) * memory.FRAGMENTS + memory.OF_CUDA
    assert memory.peak(parts, True) == pytest.approx(most)


def test_micro_batches_are_as_large_as_fit():
    found = []
    for gb in (0.6, 1, 2):
        cfg, job, shards = run_of(Config(mode="kd", micro_batch_tokens=0), gb=gb)
        tokens = memory.fitting_tokens(cfg, job, shards)
        assert memory.predicted(cfg, job, shards, tokens) <= gb * 1e9
        over = memory.predicted(cfg, job, shards, tokens + tokens // 4)
        assert over > gb * 1e9 or tokens == memory.MOST_TOKENS
        found.append(tokens)
    assert found == sorted(set(found)), found
    cfg, job, shards = run_of(Config(mode="kd", micro_batch_tokens=0))
    assert memory.fitting_tokens(cfg, job, shards) == 8192, "a CPU's memory is not known"


def test_weights_that_no_part_of_the_run_reads_take_nothing(tmp_path, monkeypatch, capsys):
    cfg, job, shards = run_of(Config(mode="sft"))
    job = dataclasses.replace(job, rows=0)
    assert not [name for name in memory.needs(cfg, job, shards, 4096) if "copy" in name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c").mkdir()
    argv = ["--kd_signal=topk", "--data=word_problems:40", "--kd_cache=c", *SMALL, "--device=cpu"]
    found = []
    for _ in range(2):
        assert train.main([*argv, "--dry_run"]) == 0
        found.append(bool(re.search(r"\bteacher [\d.]+ [kM]B", capsys.readouterr().out)))
        (tmp_path / "c" / "cache.json").touch()  # a filled cache stands in for the teacher
    assert found == [True, False]


def test_shards_divide_what_they_split():
    whole, split = (
        memory.needs(*run_of(Config(mode="kd", shard=on, shard_frozen=on), 4), 4096)
        for on in ("off", "on")
    )
    for name in ("weights", "gradients", "optimizer"):
        assert split[name] == whole[name] / 4


@pytest.mark.parametrize("rank", [0, 8])
def test_the_optimizers_states_are_planned(rank):
    """AdamW has two of a parameter, Muon one of a matrix."""
    for name in ("adamw", "muon"):
        cfg, job, shards = run_of(Config(mode="sft"), optimizer=name, lora_rank=rank)
        adapters = lora.LoraConfig(rank, 32.0) if rank else None
        cpu = torch.device("cpu")
        model, _ = load_policy(named(SHAPE), None, adapters, cpu, torch.float32, 0)
        optimizer = build_optimizer(model, 1e-3, (0.9, 0.95), 1e-8, 0.0, muon=name == "muon")
        states = [x for state in optimizer.state.values() for x in state.values()]
        said = memory.needs(cfg, job, shards, 4096)["optimizer"]
        assert said == pytest.approx(held_bytes(x for x in states if x.dim()), rel=2e-3)


def test_a_run_says_what_it_takes_and_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--mode=sft", *SMALL, "--device=cpu", "--dry_run"]
    assert train.main([*argv, "--model=tiny", "--micro_batch_tokens=auto"]) == 0
    said = capsys.readouterr().out
    assert "memory     about " in said and "KV cache" in said
    assert train.main([*argv, "--model=qwen2.5-7b", "--memory_gb=80"]) == 2
    said = capsys.readouterr().err
    assert "GB on a GPU of 80 GB (or say --memory_gb); set --lora_rank 16" in said, said
