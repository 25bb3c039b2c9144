"""The table of docs/scaling.md, computed from its words, its formulas and memory.py's."""

import dataclasses
import re

import pytest
import torch

import memory
from config import Config
from model import parallel
from model.load import Checkpoint
from model.presets import PRESETS
from tests.conftest import ROOT

SIZES = {name: PRESETS[f"qwen2.5-{name.lower()}"] for name in ("0.5B", "1.5B", "7B")}
SIZES["32B"] = dataclasses.replace(
    SIZES["7B"], hidden_size=5120, intermediate_size=27648, num_layers=64, num_heads=40
)
SIZES["32B"] = dataclasses.replace(SIZES["32B"], num_kv_heads=8)
FLOPS, WITHIN, BETWEEN = 400e12, 300e9, 40e9  # per second; bytes per second
MICRO_BATCHES, TOKENS = 4, 8192
LEFT_OUT = (*memory.APART, *memory.OF_THE_STUDENT, *memory.IN_TURN, *memory.GENERATION)
LEFT_OUT += ("cache of rollouts",)


def rows():
    """((student, is in shards, teacher, is in shards), shares on 1, 8, 64 and 512 GPUs, GB)."""
    found = []
    for line in (ROOT / "docs/scaling.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        models = re.fullmatch(r"([\d.]+B)( sharded)?, ([\d.]+B)( sharded)?", cells[0])
        if models:
            student, split, teacher, frozen_split = models.groups()
            pair = student, bool(split), teacher, bool(frozen_split)
            found.append((pair, cells[1:5], cells[5]))
    return found


def shares(pair, gpus):
    """Computing, %, where transfers hide as far as they can, and where none does."""
    student, is_split, teacher, is_frozen_split = pair
    own, other = memory.size_of(SIZES[student]), memory.size_of(SIZES[teacher])
    n, r, m = min(gpus, 8), gpus // min(gpus, 8), MICRO_BATCHES
    P, share, pairs = own.blocks + own.around, (n - 1) / n, 2 * (r - 1) / r
    forward = 2 * P * m * TOKENS / FLOPS
    backward, teaching = 2 * forward, 2 * (other.blocks + other.around) * m * TOKENS / FLOPS
    if is_split:
        gathering = share * 2 * m * own.blocks / WITHIN
        around = share * 4 * own.around / WITHIN
        back = gathering + share * 4 * m * P / WITHIN + pairs * 4 * m * P / n / BETWEEN
        plain = gathering + around + back
        hidden = around + max(0, gathering - forward) + max(0, back - backward)
    else:
        plain = hidden = 2 * share * 4 * P / WITHIN + pairs * 4 * P / n / BETWEEN
    if is_frozen_split:
        gathering = share * 2 * (m * other.blocks + other.around) / WITHIN
        plain, hidden = plain + gathering, hidden + max(0, gathering - teaching)
    computing = forward + backward + teaching
    return [100 * computing / (computing + waiting) for waiting in (hidden, plain)]


def plan(pair, gpus):
    """(options, job, shards) of on-policy distillation on H100s."""
    student, is_split, teacher, is_frozen_split = pair
    recompute = student != "0.5B"
    options = {"optimizer": "adamw", "activation_checkpointing": recompute}
    cfg = Config(mode="kd", kd_prefix="student", **options)
    place = parallel.Device(torch.device("cuda"), torch.bfloat16, 0, gpus)
    models = [Checkpoint("", None, SIZES[name], None) for name in (student, teacher)]
    job = memory.Job(models[0], models[1:], None, place, 151_665, 64, 1024, longest=1024)
    return cfg, job, memory.Shards(min(gpus, 8), is_split, is_frozen_split, 80e9 / 3)


def test_the_table_is_there():
    assert len(rows()) == 9


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0][0]} from {row[0][2]}")
def test_shares_and_memory_are_those_of_the_formulas(row, monkeypatch):
    models, said, gigabytes = row
    monkeypatch.setattr(memory.backend, "triton_serves", lambda device: True)  # an H100's kernels
    for gpus, cell in zip((8, 64, 512), said[1:], strict=True):
        hidden, plain = shares(models, gpus)
        want = f"{hidden:.0f} to {plain:.0f}" if any((models[1], models[3])) else f"{hidden:.0f}"
        assert cell == want, gpus
    cfg, job, shards = plan(models, 8)
    parts = memory.needs(cfg, job, shards, TOKENS)
    standing = sum(size for name, size in parts.items() if name not in LEFT_OUT)
    assert gigabytes == f"{standing / 1e9:.0f}"
    assert memory.predicted(cfg, job, shards, TOKENS) < 80e9, "eight GPUs are enough"
    is_split = models[1] or models[3]
    assert said[0] == ("does not fit" if is_split else "100")
    alone = plan((models[0], False, models[2], False), 1)
    assert (memory.predicted(*alone, TOKENS) > 80e9) == is_split
