"""What Weights & Biases gets: its own files are opened, as they lie in a run's folder."""

import json
import os
import struct
from pathlib import Path

import pytest

import train
from run import read_metrics
from tests.distributed_workers import run
from tests.test_train import SMALL
from tracking import Tracker

wandb = pytest.importorskip("wandb")
OFFLINE = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}


BLOCK, HEADER = 32768, 7  # LevelDB's form of a log, with seven bytes of wandb's own before it


def stored(path):
    """The records in a file of wandb, as bytes."""
    data, at, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        record += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # whole, or the last part of one
            yield record
            record = b""
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK


def records(folder):
    """{kind: [records]} of each of a run's sittings, the first one first."""
    from wandb.proto.wandb_internal_pb2 import Record

    sittings = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime):
        found = {}
        for data in stored(file):
            record = Record()
            record.ParseFromString(data)
            kind = str(record.WhichOneof("record_type"))
            found.setdefault(kind, []).append(getattr(record, kind))
        sittings.append(found)
    return sittings


def items(entries):
    """{name: value} of the items or updates of records."""
    found = {}
    for entry in entries:
        for item in [*getattr(entry, "item", ()), *getattr(entry, "update", ())]:
            found[".".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return found


def history(sitting):
    """The lines of a sitting's history, by step."""
    lines = {}
    for line in sitting["history"]:
        lines.setdefault(line.step.num, {}).update(items([line]))
    return lines


def test_a_run_is_there_with_its_tables_curves_sizes_and_axis(tmp_path):
    argv = ["--mode=grpo", *SMALL, "--model=tiny-teacher", "--grpo_samples=2", "--sample_tokens=8"]
    argv += ["--wandb=offline", "--name=w", "--wandb_group=arms", "--wandb_tags=toy, first"]
    first = run(*argv, "--steps=4", "--save_every=2", cwd=tmp_path, **OFFLINE)
    assert first.returncode == 0, first.stderr
    again = run("--name=w", "--resume", "--steps=6", cwd=tmp_path, **OFFLINE)
    assert again.returncode == 0, again.stderr
    folder = tmp_path / "runs/w"
    sittings = records(folder)
    (begun,) = sittings[0]["run"][:1]
    assert [s["run"][0].run_id for s in sittings] == 2 * [(folder / "wandb_id").read_text()]
    assert begun.run_group == "arms" and list(begun.tags) == ["toy", "first"]
    assert begun.display_name == "w" and begun.job_type == "grpo" and begun.project == "srlm"
    config = items([begun.config, *sittings[0].get("config", ())])
    assert config["lr"] == 3e-4 and config["parameters"] == config["trained_parameters"] > 0
    assert config["environment"]["device"] and config["environment"]["packages"]["torch"]
    axes = {m.name or m.glob_name: m.step_metric for m in sittings[0]["metric"]}
    assert axes["eval/*"] == "train/tokens"
    lines = history(sittings[0]) | history(sittings[1])
    for line in read_metrics(folder):
        step = line.pop("step")
        for name, value in line.items():
            assert lines[step][name] == pytest.approx(value), (step, name)
    assert lines[0]["train/tokens"] == 0
    for step in (0, 4, 6):
        assert lines[step]["samples/validation._type"] == "table-file"
        assert lines[step]["samples/validation.nrows"] == 3
    assert lines[6]["samples/rollout.nrows"] > 0
    assert lines[6]["results._type"] == "table-file" and lines[6]["curves._type"] == "image-file"
    accuracies = [lines[step]["eval/word_problems/accuracy"] for step in (4, 6)]
    summary = items(sittings[1]["summary"])
    assert summary["best/accuracy"] == max(accuracies)
    assert summary["best/step"] == (4, 6)[accuracies.index(max(accuracies))]
    media = next((folder / "wandb").glob("offline-run-*/files/media/table/samples/validation_0*"))
    table = json.loads(media.read_text())
    assert table["columns"][0] == "step" and "text" in table["columns"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more,code,folder,words",
    [  # before the run began, by options that do not fit, and after
        (["--grpo_samples=3"], 2, "", "no whole groups of --grpo_samples 3"),
        (["--mode=sft", "--lr=1e30", "--name=x"], 1, "runs/x", ""),
    ],
)
def test_a_trial_that_fails_says_why_in_its_summary(tmp_path, more, code, folder, words):
    sweep = OFFLINE | {"WANDB_SWEEP_ID": "s", "WANDB_RUN_ID": "trial", "WANDB_DIR": str(tmp_path)}
    argv = ["--mode=grpo", *SMALL, "--wandb=offline", "--model=tiny-teacher", *more]
    failed = run(*argv, cwd=tmp_path, **sweep)
    assert failed.returncode == code
    (sitting,) = records(tmp_path / folder)
    reason = items(sitting["summary"])["failed"]
    assert words in reason and reason in failed.stderr and "\n" not in reason
    assert sitting["exit"][0].exit_code == 1


class Broken:
    """A run of wandb's of which everything fails."""

    def __getattr__(self, name):
        raise ConnectionError(f"no {name}\nand more")


def test_no_failure_of_wandb_ends_a_run(tmp_path, monkeypatch, capsys):
    modes = []

    def init(mode, **_):
        modes.append(mode)
        if mode == "online":
            raise ConnectionError("no network\nand more")
        return Broken()

    monkeypatch.setattr(wandb, "init", init)
    settings = dict.fromkeys(("wandb_project", "wandb_group", "wandb_tags"), "")
    tracker = Tracker(tmp_path, settings | {"mode": "sft", "wandb": "online"}, {}, [])
    assert modes == ["online", "offline"] and tracker.run is None
    tracker.run = Broken()
    tracker.metrics(1, {"eval/t/accuracy": 1.0})
    assert tracker.run is None
    tracker.run = Broken()
    tracker.finish()
    assert tracker.run is None
    tracker.metrics(2, {"train/loss": 1.0})
    tracker.samples(2, [{"text": "a"}], evaluated=True)
    out = capsys.readouterr().out
    assert "--wandb online did not start (no network); the run goes on" in out
    assert "not logged (no log)" in out and "not finished (no " in out
    assert all(line.startswith("wandb: ") for line in out.splitlines())


def test_an_id_that_cannot_be_read_ends_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("begun under another id"))
    settings = dict.fromkeys(("wandb_project", "wandb_group", "wandb_tags"), "")
    path = tmp_path / "wandb_id"
    for make, words in (
        (os.mkfifo, "is a pipe"),
        (Path.mkdir, "is a folder"),
        (Path.touch, "is empty"),
        (lambda path: path.write_bytes(bytes(9)), "holds only zero bytes"),
    ):
        make(path)
        tracker = Tracker(tmp_path, settings | {"mode": "sft", "wandb": "offline"}, {}, [])
        assert tracker.run is None
        out = capsys.readouterr().out
        assert out.startswith("wandb: --wandb offline did not start") and words in out
        path.rmdir() if path.is_dir() else path.unlink()


def test_wandb_that_is_not_there_is_said_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tracking.find_spec", lambda name: None)
    assert train.main(["--mode=sft", *SMALL, "--wandb=offline"]) == 2
    assert capsys.readouterr().err == (
        "train.py: --wandb offline: the package is missing; pip install wandb, or leave out\n"
    )
    assert not Path("runs").exists()
