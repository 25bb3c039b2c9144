"""The formulas of memory.py beside what is counted on a CPU, and what they refuse."""

import dataclasses
import functools
import re
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
from model import lora, parallel
from model.kv_cache import KVCache
from model.load import Checkpoint, load_frozen, load_policy
from model.transformer import ModelConfig
from overview import bytes_of
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


def allocated_peak(call):
    """The most bytes of CPU memory that tensors held at a time during call(), above the start."""
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    now = most = 0
    results: Any = profile.kineto_results
    for event in results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


CASES = {
    "sft": ({}, SHAPE, 768),
    "sft, wide": ({}, WIDE, 512),
    "sft, recomputed": ({"activation_checkpointing": True}, SHAPE, 512),
    "sft, adapters": ({"lora_rank": 8}, WIDE, 512),
    "kd": ({"mode": "kd"}, SHAPE, 1024),
    "kd, a small batch": ({"mode": "kd"}, WIDE, 128),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_the_formulas_say(case):
    options, shape, tokens = CASES[case]
    cfg = Config(**({"mode": "sft"} | options))
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
        Document(rng.integers(0, 1500, 64).astype(np.int32), np.ones(64))
        for _ in range(2 * tokens // 64)
    ]

    def step(documents):
        batch = GlobalBatch(documents)
        train.forward_backward(policy, frozen, loss, batch, 1.0, tokens, device)

    step(docs[:1])  # what is made once
    policy.zero_grad()
    counted = allocated_peak(lambda: step(docs))
    vocab = 1500 if frozen else shape.vocab_size
    job = memory.Job(named(shape), [named(TEACHER)] * len(frozen), None, place(), vocab)
    parts = memory.needs(cfg, job, memory.Shards(1, False, False), tokens)
    there = ("weights", "teacher", "AdamW", "copy for generation")  # before the step
    said = memory.peak(parts, False) - sum(parts.get(name, 0) for name in there)
    print(f"{case}: counted {counted / 1e6:.1f} MB, said {said / 1e6:.1f} MB, {said / counted:.2f}")
    assert 0.95 < said / counted < 1.3


def run_of(cfg, world=1, shape=SHAPE, gb=0.0, teacher=TEACHER, **options):
    """(options, job, shards) of a run on GPUs of so many GB, in bf16."""
    cfg = dataclasses.replace(cfg, memory_gb=gb, **options)
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
        (80, 8, {"shape": LARGE, "shard": "off"}, "set --.*--shard on$"),
        # nothing is suggested that does nothing here: no frozen model, the base's adapters kept
        (80, 8, {"shape": LARGE, "shard": "off", "shard_frozen": "off"}, "True --shard on$"),
        (80, 1, {"shape": LARGE, "name": "r", "resume": True}, "take a smaller model"),
        (80, 1, {"shape": LARGE}, "set --.*--lora_rank 16$"),
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
    assert "copy for generation" not in memory.needs(cfg, job, shards, 4096)
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
    for name in ("weights", "gradients", "AdamW"):
        assert split[name] == whole[name] / 4


def test_a_run_says_what_it_takes_and_refuses_what_does_not_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--mode=sft", *SMALL, "--device=cpu", "--dry_run"]
    assert train.main([*argv, "--model=tiny", "--micro_batch_tokens=auto"]) == 0
    said = capsys.readouterr().out
    assert "memory     about " in said and "KV cache" in said
    assert train.main([*argv, "--model=qwen2.5-7b", "--memory_gb=80"]) == 2
    said = capsys.readouterr().err
    assert "GB on a GPU of 80 GB (or say --memory_gb); set --lora_rank 16" in said, said
