"""Muon beside the singular values that its iteration acts on, and PyTorch's own."""

import dataclasses
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

import train
from digests import SUMS
from eval.compare import all_options
from model import optim
from model.checkpoint import build_model
from model.lora import LoraConfig, adapt
from model.optim import NEWTON_SCHULZ, build_optimizer, orthogonalized
from model.presets import PRESETS
from run import RunFolder, read_metrics
from tests.test_train import SMALL

BETAS, EPS = (0.9, 0.98), 1e-8


def tiny():
    """With a head of its own."""
    shape = dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=False)
    return build_model(shape, None, device="cpu", seed=0).double()


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
    want = u * s[:, None] @ vh
    torch.testing.assert_close(orthogonalized(matrix_BMN), want)
    for size in (1e-36, 1e-22, 1e30):  # whose squares are no numbers of fp32
        found = orthogonalized((matrix_BMN * size).float())
        torch.testing.assert_close(found, want.float(), rtol=1e-4, atol=1e-4)


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
    for lr in (1e-2, 2e-2, 5e-3):
        for group in [group for o in (optimizer, *plain) for group in o.param_groups]:
            group["lr"] = lr
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


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "draw_curves", lambda folder: None)
    return tmp_path


RUN = ["--mode=sft", *SMALL, "--device=cpu", "--eval_examples=0"]
MOMENTUM = "momentum.layers.0.mlp.up_proj.weight"


def test_a_run_keeps_its_optimizer_and_says_which(home, capsys):
    assert train.main([*RUN, "--name=m", "--optimizer=muon", "--steps=2"]) == 0
    assert "optimizer  muon, lr 0.01" in capsys.readouterr().out
    path = home / "runs/m/checkpoints/step-2/trainer/optimizer.safetensors"
    tensors = load_file(path)
    matrices = [name for name in tensors if name.startswith("momentum.")]
    assert len(matrices) == 2 * 7 and "exp_avg.embed_tokens.weight" in tensors
    assert all(tensors[name].any() for name in matrices)
    assert train.main([*RUN, "--name=m", "--optimizer=adamw", "--resume"]) == 2
    assert re.search("--optimizer.*adamw.*muon|--optimizer.*muon.*adamw", capsys.readouterr().err)
    assert train.main([*RUN, "--name=m", "--resume", "--steps=4"]) == 0


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: {k: v for k, v in t.items() if k != MOMENTUM}, f"{MOMENTUM} is missing"),
        (lambda t: t | {MOMENTUM: t[MOMENTUM][:1]}, f"{MOMENTUM} is F32 of shape"),
        (lambda t: t | {MOMENTUM: t[MOMENTUM] / 0}, f"{MOMENTUM} holds numbers"),
        (lambda t: t | {MOMENTUM.replace("momentum", "exp_avg"): t[MOMENTUM] + 0}, "unexpected"),
    ],
)
def test_a_damaged_momentum_is_refused(change, words, home, capsys):
    assert train.main([*RUN, "--name=m", "--optimizer=muon", "--steps=2"]) == 0
    step = home / "runs/m/checkpoints/step-2"
    path = step / "trainer/optimizer.safetensors"
    save_file(change(load_file(path)), path)
    for sums in list(step.rglob(SUMS)):
        sums.unlink()
    assert train.main(["--name=m", "--resume", "--steps=4"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1


def test_an_average_that_no_one_wants_changes_nothing(home):
    """In the file of a run that had another teacher."""
    assert train.main([*RUN, "--name=m", "--optimizer=muon", "--steps=2"]) == 0
    folder = RunFolder(home / "runs/m")
    path = folder.step_folder(2) / "trainer/optimizer.safetensors"
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    averages = {f"average.{name}": torch.ones_like(p) for name, p in model.named_parameters()}
    save_file(load_file(path) | averages, path)
    folder.load(2, model, build_optimizer(model, 1e-2, BETAS, EPS, 0.1, muon=True))
    assert all(map(torch.equal, model.parameters(), before))


def test_runs_of_before_there_was_a_choice_were_adamws(home, capsys):
    assert train.main([*RUN, "--name=old", "--optimizer=adamw", "--steps=2"]) == 0
    path = home / "runs/old/config.json"
    stored = json.loads(path.read_text())
    assert stored.pop("optimizer") == "adamw"
    path.write_text(json.dumps(stored))
    assert all_options(path.parent)["optimizer"] == "adamw"
    capsys.readouterr()
    assert train.main(["--config=runs/old/config.json", "--dry_run"]) == 0
    assert "optimizer  adamw, lr 0.005" in capsys.readouterr().out
    assert train.main(["--name=old", "--resume", "--steps=4"]) == 0
    assert "optimizer  adamw, lr 0.005" in capsys.readouterr().out


def test_what_an_update_costs_is_counted(home):
    model = tiny()
    optimizer = build_optimizer(model, 1e-2, BETAS, EPS, 0.1, muon=True)
    give_gradients(model)
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    assert optimizer.flops() == counted.get_total_flops() > 0
    flops = {}
    for name in ("adamw", "muon"):
        assert train.main([*RUN, f"--name={name}", f"--optimizer={name}", "--steps=3"]) == 0
        flops[name] = read_metrics(home / "runs" / name)[-1]["train/flops"]
    tied = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    an_update = build_optimizer(tied, 1e-2, BETAS, EPS, 0.1, muon=True).flops()
    assert flops["muon"] - flops["adamw"] == 3 * an_update


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
