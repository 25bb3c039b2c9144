"""What a run says it has cost, against the products that PyTorch counts while it goes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
from kernels import attention as attention_module
from kernels import cpu
from kernels.attention import PackedAttention
from model.checkpoint import build_model
from model.flops import forward_flops, generation_flops, peak_flops
from model.generate import generate
from model.presets import PRESETS
from model.transformer import Transformer
from run import RunLogger, duration, read_metrics

SMALL = [
    "--device=cpu",
    "--optimizer=adamw",
    "--steps=4",
    "--batch_size=4",
    "--eval_examples=0",
    "--lr=1e-4",
    "--data=word_problems:40",
    "--name=r",
    "--runs=.",
]
WEIGHED = ["--mode=kd", "--teacher=random:tiny-teacher"]
WRITTEN = ["--mode=kd", "--teacher=random:tiny-teacher", "--sample_tokens=8"]
GRPO = [
    "--mode=grpo",
    "--model=tiny-teacher",
    "--sample_tokens=8",
    "--grpo_samples=2",
    "--grpo_kl_coef=0.1",
    "--grpo_reward=mine.py:letters",
]
REUSED = [
    *GRPO,
    "--grpo_minibatches_per_rollout=2",
    "--grpo_ppo_epochs=2",
    "--grpo_dynamic_sampling_rounds=1",
    "--grpo_kd_coef=0.5",
    "--teacher=random:tiny-teacher",
]

# options, calls of `generate`, tokens that the teacher reads for each that is trained on, and those
# that it generates for each that is sampled
CASES = {
    "sft": (["--mode=sft"], 0, 0, 0),
    "kd": (["--mode=kd", "--teacher=random:tiny-teacher", "--kd_ce=0.5"], 0, 1, 0),
    "kd over the student's top-k, weighed": (
        [*WEIGHED, "--kd_signal=student_topk", "--kd_topk=4", "--kd_weight_by=teacher_entropy"],
        0,
        1,
        0,
    ),
    "kd by draws, weighed": (
        [*WEIGHED, "--kd_signal=draws", "--kd_weight_by=student_entropy"],
        0,
        1,
        0,
    ),
    "kd on the student's text or the data": (
        [*WRITTEN, "--kd_prefix=student", "--kd_mix=0.5"],
        1,
        1,
        0,
    ),
    "kd on the teacher's text": ([*WRITTEN, "--kd_prefix=teacher", "--kd_signal=topk"], 4, 1, 1),
    "kd by sampled tokens": (
        [
            *WRITTEN,
            "--kd_prefix=student",
            "--kd_signal=sampled",
            "--kd_divergence=reverse_kl",
            "--kd_temperature=1",
        ],
        4,
        1,
        0,
    ),
    "grpo": (GRPO, 4, 0, 0),
    "grpo, one rollout for four steps": (REUSED, 1, 1, 0),
    "gspo, its ratios first": (
        [*GRPO, "--grpo_variant=gspo", "--grpo_minibatches_per_rollout=2"],
        2,
        0,
        0,
    ),
    "kd without a teacher": (
        ["--mode=kd", "--sample_tokens=8", "--kd_prefix=student", "--kd_signal=unlikely"],
        4,
        0,
        0,
    ),
    "gmpo, its means first": (
        [*GRPO, "--grpo_variant=gmpo", "--grpo_minibatches_per_rollout=2"],
        2,
        0,
        0,
    ),
    "gspo, one update": ([*GRPO, "--grpo_variant=gspo"], 4, 0, 0),
    "gspo and a teacher": ([*REUSED, "--grpo_variant=gspo"], 1, 1, 0),
    "grpo with lora": ([*GRPO, "--lora_rank=4"], 4, 0, 0),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def letters(example, completion):\n"
        "    return completion.count('e') + 0.01 * len(completion)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_curves", lambda folder: None)


def attention_flops(counted):
    """Of batched products: nothing but attention has them here."""
    return counted.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


@pytest.mark.parametrize("args,generations,read,written", CASES.values(), ids=CASES)
def test_a_run_counts_its_tokens_and_flops(args, generations, read, written, here, monkeypatch):
    """Without attention (below), whose products are batched, the products are exactly those that
    PyTorch sees, from the first batch to the last update. Only under LoRA is one counted that is
    not computed: nothing needs the gradient of the first layer's input."""
    flops_per_token, done = Transformer.flops_per_token, []
    monkeypatch.setattr(
        Transformer, "flops_per_token", lambda model, context: flops_per_token(model, 0)
    )
    monkeypatch.setattr(
        "rl.rollout.generate",
        lambda *args, **more: done.append(generate(*args, **more)) or done[-1],
    )
    cpu.onednn_is_exact()  # once in a process: its trial products are not the run's
    with FlopCounterMode(display=False) as counted:
        assert train.main([*SMALL, *args]) == 0
    lines = read_metrics(Path("r"))
    last = lines[-1]
    sampled = sum(len(c.tokens) for completions in done for c in completions)
    assert (
        len(done) == generations
        and last["train/sampled_tokens"] == sampled
        and (sampled > 0) == (generations > 0)
    )
    assert last["train/teacher_tokens"] == read * last["train/tokens"] + written * sampled
    lora = "--lora_rank=4" in args
    seen = counted.get_total_flops() - attention_flops(counted)
    assert last["train/flops"] == pytest.approx(seen, rel=0.02 if lora else 1e-9)
    assert not lora or last["train/flops"] > seen
    costs = [[m[f"train/{name}"] for name in train.COSTS] for m in lines]
    assert costs == sorted(costs) and len(costs) == 4  # of the run so far


def test_attention_is_counted(monkeypatch):
    """A token attends to itself and all before it; the formula takes half of n for the mean of
    1 … n, which is 1/n less."""
    model, spent, attention = (
        build_model(PRESETS["tiny"], None, device="cpu", seed=0),
        [],
        F.scaled_dot_product_attention,
    )

    def seen(q, k, v, is_causal=False, **more):
        spent.append(
            4 * q.numel() * (k.shape[2] if not is_causal else (k.shape[2] + 1) / 2)
        )  # q·k and p·v, two FLOPs a product
        return attention(q, k, v, is_causal=is_causal, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    monkeypatch.setattr(attention_module, "FEW_SCORES", 0)  # the other form computes all of q kᵀ
    matrices = sum(p.numel() for layer in model.layers for p in layer.parameters() if p.dim() == 2)
    tokens = torch.arange(120)
    model(tokens, tokens % 60, PackedAttention([60, 60]))
    assert forward_flops(model, [60, 60], 7, 500) == pytest.approx(
        120 * 2 * matrices + 7 * 2 * 96 * 500 + sum(spent), rel=1e-3
    )
    assert forward_flops(model, [60, 60], 0, 500) - 120 * 2 * matrices == pytest.approx(
        sum(spent), rel=1 / 50
    )
    spent.clear()
    prompts = [list(range(50))] * 2
    with FlopCounterMode(display=False) as counted:
        generate(model, prompts, 10, [], vocab=500)
    spent.append(attention_flops(counted))
    assert generation_flops(model, prompts, [10, 10], 500) - (
        49 + 20
    ) * 2 * matrices - 20 * 2 * 96 * 500 == pytest.approx(sum(spent), rel=1 / 50)


def test_a_checkpoint_from_before_these_were_counted_goes_on_from_0(here):
    assert train.main([*SMALL, *GRPO, "--steps=2"]) == 0
    state = Path("r/checkpoints/step-2/trainer/state.json")
    saved = json.loads(state.read_text())
    assert saved["counters"].keys() == {*train.COSTS, "skipped", "skipped_in_a_row", "no_gradient"}
    state.with_name("SHA256SUMS").unlink()  # changed on purpose
    state.write_text(
        json.dumps(
            saved
            | {
                "counters": {
                    k: saved["counters"][k] for k in ("tokens", "skipped", "skipped_in_a_row")
                }
            }
        )
    )
    assert train.main(["--name=r", "--runs=.", "--resume", "--steps=3"]) == 0
    second, third = read_metrics(Path("r"))[-2:]
    assert (
        third["train/tokens"] > second["train/tokens"]
        and 0 < third["train/sampled_tokens"] <= 4 * 8
    )
    assert 0 < third["train/flops"] < second["train/flops"]


@pytest.mark.parametrize(
    "seconds,text",
    [
        (0, "0m00s"),
        (0.4, "0m00s"),
        (29, "0m29s"),
        (31.6, "0m32s"),
        (59.4, "0m59s"),
        (59.6, "1m00s"),
        (61, "1m01s"),
        (92.2, "1m32s"),
        (3599.4, "59m59s"),
        (3599.5, "1h00m00s"),
        (3661, "1h01m01s"),
        (90061, "25h01m01s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_time_left_is_what_is_left(tmp_path, capsys):
    values = {
        "train/loss": 1.0,
        "train/grad_norm": 1.0,
        "train/lr": 1e-3,
        "train/tokens_per_second": 9.0,
        "train/skipped": 0,
        "train/no_gradient": 0,
    }
    log = RunLogger.__new__(RunLogger)
    log.rank, log.note = 0, ""
    for left, text in ((32.0, "0m32s left"), (29.0, "0m29s left"), (7322.0, "2h02m02s left")):
        log.progress(500, 1000, values, left)
        assert capsys.readouterr().out.endswith(f"  {text}\n")


def test_peaks_are_those_of_the_named_card():
    """Data sheets, dense bf16 in TFLOP/s; a card that is not listed has no peak, and never that of
    a card with a similar name."""
    known = {
        "NVIDIA H100 80GB HBM3": 989,
        "NVIDIA H100 PCIe": 756,
        "NVIDIA H100 NVL": 835,
        "NVIDIA H200": 989,
        "NVIDIA H800": 989,
        "NVIDIA H20": 148,
        "NVIDIA GH200 480GB": 989,
        "NVIDIA B200": 2250,
        "NVIDIA A100-SXM4-80GB": 312,
        "A100-SXM4-40GB": 312,
        "NVIDIA A100 80GB PCIe": 312,
        "NVIDIA A800-SXM4-80GB": 312,
        "NVIDIA A10": 125,
        "NVIDIA A10G": 70,
        "NVIDIA L4": 121,
        "NVIDIA L40": 181,
        "NVIDIA L40S": 362,
        "NVIDIA GeForce RTX 4090": 165.2,
        "NVIDIA GeForce RTX 3090": 71,
    }
    assert {name: peak_flops(name) / 1e12 for name in known} == pytest.approx(known)
    unknown = [
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "NVIDIA A1000",
        "Tesla T4",
        "x86_64",
        "",
        "AMD Instinct MI300X",
    ]
    assert [peak_flops(name) for name in unknown] == [None] * len(unknown)
