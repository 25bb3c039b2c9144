"""The study runner: chains, runs in common made once, what is done skipped, what was cut resumed, one report."""

import json

import pytest

from eval import study

FILE = """
[study]
seeds = [0]
eval = { tasks = "word_problems", n = 1, max_tokens = 4, limit = 8 }
[common]
data = "word_problems:8"
steps = 2
batch_size = 4
eval_examples = 2
eval_tokens = 2
model = "tiny"
[arm.sft]
chain = [{ mode = "sft" }]
[arm.sft_sft]
chain = [{ mode = "sft" }, { mode = "sft", lr = 1e-3 }]
"""


@pytest.fixture
def trained(monkeypatch):
    """Counts the runs of train.py."""
    made, call = [], study.subprocess.run
    monkeypatch.setattr(study.subprocess, "run", lambda argv, **more: (made.append(argv) if "eval" not in argv else None, call(argv, **more))[1])
    return made


def test_runs_in_common_are_made_once_and_a_study_goes_on(tmp_path, trained, capsys):
    file = tmp_path / "s.toml"
    file.write_text(FILE)
    argv = [str(file), f"--out={tmp_path / 'out'}"]
    assert study.main([*argv, "--arms=sft"]) == 0 and len(trained) == 1
    assert study.main(argv) == 0
    assert len(trained) == 2  # the continuation; what it continues was there
    began = [next(a for a in argv if a.startswith("--model=")) for argv in trained]
    assert began.count("--model=tiny") == 1 and all("step-2" in b for b in began if b != "--model=tiny")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [r["arm"] for r in report] == ["sft", "sft_sft"] and report[1]["tokens"] > report[0]["tokens"]
    before = (tmp_path / "out" / "report.md").read_text()
    (tmp_path / "out" / "runs" / report[1]["runs"][0][1] / "done").unlink()  # killed behind its last checkpoint
    assert study.main(argv) == 0 and "--resume" in trained[-1] and len(trained) == 3
    assert (tmp_path / "out" / "report.md").read_text() == before
    assert "sft_sft" in capsys.readouterr().out


def test_intervals_over_seeds():
    mean, low, high = study.interval([0.70, 0.74, 0.78], (9, 9, 9))
    assert mean == pytest.approx(0.74) and high - mean == pytest.approx(4.302653 * 0.04 / 3**0.5, rel=1e-6) and mean - low == pytest.approx(high - mean)
    mean, low, high = study.interval([0.6, 0.8], (9, 9, 9))
    assert high - mean == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert study.interval([0.5], (0.5, 0.4, 0.6)) == (0.5, 0.4, 0.6)


@pytest.mark.parametrize("text,said", [
    ("[study]\nseeds = [0]\n[arm.a]\nchain = [{}]", "mode"), ("[study]\n[arm.a]\nchain = []", "seeds"), ("[studi]\n", "studi"), ("x = ", "TOML"),
    ('[study]\nseeds = [0]\n[arm.a]\nchain = [{ mode = "sft", lrr = 1 }]', "lrr"),
])  # fmt: skip
def test_wrong_files_are_one_line(text, said, tmp_path, capsys):
    (tmp_path / "s.toml").write_text(text)
    assert study.main([str(tmp_path / "s.toml"), f"--out={tmp_path / 'o'}"]) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1
