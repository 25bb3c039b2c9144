"""Muon beside the singular values that its iteration acts on, and PyTorch's own."""

import json
import re

import pytest
import torch

import train
from model import optim
from model.checkpoint import build_model
from model.lora import LoraConfig, adapt
from model.optim import NEWTON_SCHULZ, build_optimizer, orthogonalized
from model.presets import PRESETS
from tests.test_train import SMALL

BETAS, EPS = (0.9, 0.98), 1e-8


def tiny(dtype=torch.float64):
    return build_model(PRESETS["tiny"], None, device="cpu", seed=0).to(dtype)


def give_gradients(*models):
    """The same random gradients to all models."""
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        grad = torch.randn_like(parameters[0]) * 1e-3
        for p in parameters:
            if p.requires_grad:
                p.grad = grad.clone()


@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (1, 6), (3, 1)])
def test_the_iteration_acts_on_singular_values_alone(shape):
    matrix_BMN = torch.randn(3, *shape, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix_BMN, full_matrices=False)
    a, b, c = NEWTON_SCHULZ
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalized(matrix_BMN), u * s[:, None] @ vh)
    torch.testing.assert_close(orthogonalized(matrix_BMN * 1e-30), u * s[:, None] @ vh)


def test_singular_values_come_near_one_and_nothing_stays_nothing():
    s = torch.linspace(0.02, 1, 50, dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonalized(torch.diag(s)[None]))
    assert found.min() > 0.67 and found.max() < 1.21
    assert not orthogonalized(torch.zeros(2, 3, 4)).any()


def plain_optimizers(model, lr, weight_decay):
    """PyTorch's Muon for the matrices in the blocks, its AdamW for what else is trained."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        in_block = name.startswith("layers.") and p.dim() == 2
        if p.requires_grad:
            (matrices if in_block else others).append(p)
    muon = torch.optim.Muon(
        matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    rest = [{"params": others}]  # none with adapters
    return [muon, torch.optim.AdamW(rest, lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0)]


@pytest.mark.parametrize("at_once", [1, 1 << 20], ids=["one by one", "stacked"])
@pytest.mark.parametrize("adapters", [False, True])
def test_updates_are_those_of_pytorch(adapters, at_once, monkeypatch):
    monkeypatch.setattr(optim, "STACKED_ELEMENTS", at_once)
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # PyTorch rounds to it
    ours, theirs = tiny(), tiny()
    if adapters:
        ours, theirs = (adapt(m, LoraConfig(4, 8.0), 0, torch.float64) for m in (ours, theirs))
    optimizer = build_optimizer(ours, 1e-2, BETAS, EPS, 0.1, muon=True)
    plain = plain_optimizers(theirs, 1e-2, 0.1)
    for _ in range(3):
        give_gradients(ours, theirs)
        optimizer.step()
        optimizer.zero_grad()
        for other in plain:
            other.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_a_parameter_without_a_gradient_stays_as_it_is():
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(model, 1e-2, BETAS, EPS, 0.1, muon=True)
    model.layers[0].mlp.up_proj.weight.grad = torch.ones(256, 96, dtype=torch.float64)
    optimizer.step()
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert sum(moved) == 1


def test_a_run_keeps_its_optimizer_and_says_which(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--mode=sft", *SMALL, "--device=cpu", "--name=m"]
    assert train.main([*argv, "--optimizer=muon", "--steps=2"]) == 0
    assert "optimizer  muon, lr 0.01" in capsys.readouterr().out
    assert train.main([*argv, "--optimizer=adamw", "--resume"]) == 2
    assert re.search("--optimizer.*adamw.*muon|--optimizer.*muon.*adamw", capsys.readouterr().err)
    assert train.main([*argv, "--resume", "--steps=4"]) == 0


def test_a_run_of_before_there_was_a_choice_goes_on_with_adamw(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["--mode=sft", *SMALL, "--device=cpu", "--name=old", "--optimizer=adamw", "--steps=2"]
    assert train.main(argv) == 0
    path = tmp_path / "runs/old/config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("optimizer") == "adamw"
    path.write_text(json.dumps(stored))
    assert train.main(["--name=old", "--resume", "--steps=4"]) == 0
    assert "optimizer  adamw, lr 0.005" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given, optimizer, lr, steps",
    [
        (["--mode=kd"], "muon", 1e-2, 500),
        (["--mode=kd", "--optimizer=adamw"], "adamw", 5e-3, 1000),
        (["--mode=grpo"], "adamw", 3e-4, 200),
        (["--mode=sft", "--model=qwen2.5-0.5b"], "adamw", 2e-5, 0),
        (["--mode=sft", "--model=qwen2.5-0.5b", "--optimizer=muon"], "muon", 2e-5, 0),
    ],
)
def test_defaults_follow_the_optimizer(given, optimizer, lr, steps):
    cfg = train.options.parse(train.Config, given)
    assert (cfg.optimizer, cfg.lr, cfg.steps) == (optimizer, lr, steps)
