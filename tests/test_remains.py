"""A command that is refused, or fails before its first result, leaves nothing on the disk."""

import json

import pytest

import eval.__main__
import eval.compare
import eval.divergence
import eval.study.__main__
import eval.traces
import prepare
import toy_models
import train
from errors import RunFailed, UserError
from eval import sampling
from files import check_place, made
from model.checkpoint import build_model, save_model
from model.presets import PRESETS


@pytest.fixture
def toy(tmp_path):
    """The folder of a model, in a folder beside which nothing else is."""
    folder, tokenizer = tmp_path / "toy", toy_models.toy_tokenizer()
    folder.mkdir()
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    save_model(model, folder, tokenizer, tokenizer.stop_ids())
    return folder


def fail(*arguments, **more):
    raise RunFailed("no memory left")


def there(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


SAMPLED = ["--tasks=word_problems", "--limit=2", "--max_tokens=4"]
EVAL = (eval.__main__, [*SAMPLED, "--out={}/new/evals"])
TRACES = (eval.traces, ["--data=word_problems:2", "--max_tokens=4", "--out={}/new/traces"])


@pytest.mark.parametrize(("command", "arguments"), [EVAL, TRACES])
@pytest.mark.parametrize("error", [RunFailed("no memory left"), KeyboardInterrupt()])
def test_an_evaluation_that_fails_before_its_first_sample(
    command, arguments, error, toy, tmp_path, monkeypatch, undrawn
):
    before = there(tmp_path)
    argv = [str(toy), *(argument.format(tmp_path) for argument in arguments)]
    real, calls = sampling.generate, []

    def generate(*given, on_done, **more):
        def done(i, completion):
            on_done(i, completion)
            raise error

        calls.append(1)
        if len(calls) == 1:
            raise error
        return real(*given, on_done=done if len(calls) == 2 else on_done, **more)

    monkeypatch.setattr(sampling, "generate", generate)
    assert command.main(argv) in (1, 130)
    assert there(tmp_path) == before
    assert command.main(argv) in (1, 130)
    assert len(there(tmp_path)) > len(before)  # one sample is kept
    assert command.main(argv) == 0
    assert len(calls) == 3


def test_an_evaluation_keeps_what_an_earlier_one_made(toy, tmp_path, monkeypatch, undrawn):
    argv = [str(toy), *SAMPLED, f"--out={tmp_path}/evals"]
    assert eval.__main__.main(argv) == 0
    before = there(tmp_path)
    monkeypatch.setattr(sampling, "generate", fail)
    assert eval.__main__.main([*argv, "--n=2"]) == 1
    assert set(before) <= set(there(tmp_path))


def test_a_comparison_that_cannot_be_drawn(tmp_path, monkeypatch):
    for name in "ab":
        run = tmp_path / name
        run.mkdir()
        (run / "config.json").write_text(json.dumps({"mode": "sft", "seed": 0, "lr": 0.1}))
        (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}\n')
    before = there(tmp_path)
    monkeypatch.setattr(eval.compare, "draw", fail)
    argv = [f"{tmp_path}/a", f"{tmp_path}/b", f"--out={tmp_path}/x/y"]
    assert eval.compare.main(argv) == 1
    assert there(tmp_path) == before


def test_a_study_whose_folder_cannot_be_made(tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "study.toml"
    out.mkdir()
    (out / "evals").write_text("")
    file.write_text(
        '[study]\nseeds = [0]\n[eval]\ntasks = "word_problems"\n'
        '[run.a]\nmode = "sft"\n[arm.a]\nmodel = "tiny"\nchain = ["a"]\n'
    )
    before = there(tmp_path)
    argv = [str(file), f"--out={out}"]
    assert eval.study.__main__.main(argv) == 2
    assert "cannot be made" in capsys.readouterr().err
    assert there(tmp_path) == before


def test_a_run_that_fails_before_its_first_step(toy, tmp_path, monkeypatch):
    before = there(tmp_path)
    argv = ["--mode=kd", f"--model={toy}", f"--teacher={toy}", "--data=word_problems:8"]
    argv += [
        "--kd_signal=topk",
        f"--kd_cache={tmp_path}/caches/a",
        "--steps=1",
        "--eval_examples=0",
    ]
    argv += [f"--runs={tmp_path}/new/runs"]
    monkeypatch.setattr(prepare, "teacher_topk", fail)
    assert train.main(argv) == 1
    assert there(tmp_path) == before
    monkeypatch.setattr(prepare, "build_optimizer", fail)  # once the cache could be filled
    assert train.main(argv) == 1
    assert there(tmp_path) == before


def test_folders_that_were_made_go_again_unless_something_is_in_them(tmp_path):
    deep = tmp_path / "a" / "b" / "c"
    with pytest.raises(UserError), made(deep):
        assert deep.is_dir()
        raise UserError("no")
    assert there(tmp_path) == []
    check_place(deep)
    assert there(tmp_path) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        check_place(tmp_path / "file" / "x")
    (tmp_path / "file").unlink()
    with pytest.raises(UserError), made(deep):
        (deep.parent / "kept").write_text("")
        raise UserError("no")
    assert there(tmp_path) == ["a", "a/b", "a/b/kept"]
    with pytest.raises(UserError), made(deep.parent):
        (deep.parent / "kept").unlink()
        raise UserError("no")
    assert there(tmp_path) == ["a", "a/b"]  # it was there before
    with made(deep):
        pass
    assert deep.is_dir()
