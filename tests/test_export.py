"""Checkpoints for use elsewhere: bf16, a card, and what stays on the disk."""

import json
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import train
from curves import series
from digests import SUMS, verify
from eval.study import plan as study_plan
from eval.study.disk import disk_line
from model import export
from model.card import licence_of
from model.export import main
from run import RunFolder, read_metrics
from tests.test_train import SMALL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of two steps from a model whose card states a licence."""
    cwd = tmp_path_factory.mktemp("run")
    argv = ["--mode=sft", "--device=cpu", *SMALL, "--steps=2", f"--runs={cwd}"]
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(cwd)
        assert train.main([*argv, "--name=base"]) == 0
        base = cwd / "base/checkpoints/step-2"
        (base / "README.md").write_text("---\nlicense: apache-2.0\n---\nlicense: mit\n")
        (base / SUMS).unlink()
        assert train.main([*argv, "--name=r", f"--model={base}", "--lora_rank=2"]) == 0
    return cwd / "r"


def test_a_checkpoint_has_a_card(folder):
    text = (folder / "checkpoints/step-2/README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n")
    assert "\nlicense: apache-2.0\n" in text
    assert "method: sft, after step 2" in text and "data: word_problems:20" in text
    name = "eval/word_problems/accuracy"
    steps, accuracies = series(read_metrics(folder), name)
    assert steps[-1] == 2 and f"{name}: {accuracies[-1]:.4g}" in text
    options = json.loads(text.split("```json\n")[1].split("\n```")[0])
    assert options == json.loads((folder / "config.json").read_text())
    assert licence_of(folder / "checkpoints/step-2") == "apache-2.0"  # passed on
    assert licence_of(folder) == ""


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_export_is_the_checkpoint_but_for_rounding(folder, dtype, tmp_path, capsys):
    out = tmp_path / "deep" / "model"
    assert main([str(folder), str(out), f"--dtype={dtype}"]) == 0
    source = folder / "checkpoints/step-2"
    ours, theirs = (load_file(path / "model.safetensors") for path in (out, source))
    wanted = getattr(torch, dtype)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor.to(wanted))
    config = json.loads((out / "config.json").read_text())
    assert dtype in (config.get("dtype"), config.get("torch_dtype"))
    assert not (out / "trainer").exists() and not (out / "adapter").exists()
    for name in ("README.md", "generation_config.json", "tokenizer.json", "trained_on.bin"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert {path.name for path in verify(out)} == {p.name for p in out.iterdir()} - {SUMS}
    assert main([str(folder), str(out)]) == 2  # it is there now
    assert capsys.readouterr().err.count("exists; name another folder") == 1
    import transformers

    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == wanted
    assert [path.name for path in out.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [1e6, float("nan")])
def test_weights_that_a_dtype_does_not_hold_are_refused(
    folder, tmp_path, monkeypatch, capsys, value
):
    build = export.build_model

    def huge(*args, **kwargs):
        model = build(*args, **kwargs)
        model.get_parameter("norm.weight").data[0] = value
        return model

    monkeypatch.setattr(export, "build_model", huge)
    assert main([str(folder), str(tmp_path / "m"), "--dtype=float16"]) == 2
    assert "norm.weight is not finite in float16" in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_what_is_kept_of_a_complete_run_is_its_models(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "r")
    before = {path for path in (tmp_path / "r").rglob("*") if "trainer" not in path.parts}
    RunFolder(tmp_path / "r").drop_trainer()
    assert set((tmp_path / "r").rglob("*")) == before
    assert main([str(tmp_path / "r"), str(tmp_path / "m")]) == 0


STUDY = """
[study]
seeds = [0, 1]
[eval]
tasks = "word_problems"
limit = 2
[common]
mode = "sft"
data = "word_problems:20"
steps = 2
[run.a]
max_checkpoints = 3
[run.b]
save = "last"
lora_rank = "4"
[run.c]
save = "none"
[arm.a]
model = "tiny-teacher"
chain = ["a", "b"]
[arm.c]
model = "random:tiny"
chain = ["c"]
[arm.hub]
model = "someone/not-here"
chain = ["a"]
"""


def test_a_study_says_what_it_takes_on_the_disk(tmp_path, monkeypatch, folder):
    (tmp_path / "s.toml").write_text(STUDY)
    study = study_plan.read(tmp_path / "s.toml")
    (tmp_path / "done").mkdir()
    # 96 wide, 2 of 4 heads for keys and values, biases of the three, an MLP of 256, two norms
    layer = 2 * 96 * 96 + 2 * 96 * 48 + (96 + 48 + 48) + 3 * 96 * 256 + 2 * 96
    size = 512 * 96 + 3 * layer + 96
    adapters = 3 * 4 * (2 * (96 + 96) + 2 * (96 + 48) + 3 * (96 + 256))
    kept = 2 * 4 * (3 * size + size + adapters)
    running = [4 * 4 * 3 * size, 4 * (size + adapters + 2 * adapters)]
    usage = namedtuple("usage", "total used free")
    for free, at_once, more in (
        (10**12, 1, running[0]),
        (10**12, 2, 2 * running[0]),
        (10**12, 4, 2 * sum(running)),
        (10**6, 1, running[0]),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        line, expected = disk_line(study, tmp_path, at_once), kept + more
        assert f"disk: at most {expected / 1e6:.3g} MB" in line
        assert f"{kept / 1e6:.3g} MB stay" in line
        assert "not counted, as they are not here yet: someone/not-here" in line
        assert ("THIS IS NOT ENOUGH" in line) == (free < expected)


def test_what_a_killed_export_left_is_in_nobodys_way(folder, tmp_path, monkeypatch):
    def killed(draft):
        raise SystemExit  # as if: `finally` clauses are made void below

    with monkeypatch.context() as patched:
        patched.setattr(export, "seal", killed)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(SystemExit):
            main([str(folder), str(tmp_path / "out")])
    (left,) = tmp_path.iterdir()
    ended = subprocess.Popen("true")
    ended.wait()
    left.rename(left.with_name(left.name.replace(f"-{os.getpid()}.", f"-{ended.pid}.")))
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    verify(tmp_path / "out")
