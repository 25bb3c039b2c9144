"""Damaged and hostile files: refused in one line or harmless, and nothing in between.

What a checkpoint, a cache or an evaluation of ours has on the disk is flipped and cut at random
(slow); files from elsewhere get hostile values.
"""

import copy
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file, save_file

import digests
import files
import train
from data.chat_template import parse_template_kwargs
from data.dataset import DataStream
from data.formats import read_examples
from data.teacher_cache import TeacherCache
from errors import UserError, as_command, say
from eval import __main__ as evaluate
from eval import compare, summary
from files import draft_of, replace_file
from limits import within
from locks import is_held, unused, use
from model.checkpoint import read_adapter
from model.hf import config_from_hf
from model.lineage import weights_mark
from model.load import find, verified
from model.state import read_state
from rl.rollout import MixedSource, Rollouts
from run import RunFolder, cut_back, read_metrics
from tests.conftest import ROOT
from tests.evaluation import checkpoint, command
from tests.test_teacher_cache import documents, filled

pytestmark = pytest.mark.usefixtures("undrawn")
TIMES = float(os.environ.get("SRLM_FUZZ", "1"))  # of the counts of the long campaigns
SEED = os.environ.get("SRLM_FUZZ_SEED", "")  # another one for other inputs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with adapters, with two checkpoints."""
    home = tmp_path_factory.mktemp("run")
    argv = "--mode=sft --device=cpu --steps=2 --save_every=1 --batch_size=2 --eval_examples=0"
    argv += f" --data=word_problems:4 --lora_rank=2 --optimizer=adamw --runs={home} --name=r"
    assert train.main(argv.split()) == 0
    return home / "r"


@pytest.fixture
def own(run, tmp_path):
    """A copy of that run."""
    return shutil.copytree(run, tmp_path / "r")


# --- flips and cuts -------------------------------------------------------------------------------


def flip(path, rng):
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def damaged(folder, look, rng, flips, cuts):
    """Damage one file after another; {"refused": n, "harmless": n}, and the files of silent harm.

    look: returns everything that is read back.
    """
    before, counts, silent = look(), {"refused": 0, "harmless": 0}, []
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
    for i in range(flips + cuts):
        path = files[i % len(files)]
        content = path.read_bytes()
        (flip if i < flips else cut)(path, rng)
        try:
            found = look()
            counts["harmless"] += found == before
            silent += [path] * (found != before)
        except UserError as e:
            assert "\n" not in str(e)
            counts["refused"] += 1
        path.unlink()  # a linked file is another one now
        path.write_bytes(content)
    return counts, silent


def look_at_run(folder):
    """What resuming and evaluating the last checkpoint of a run read, as one comparable value."""

    def look():
        runs = RunFolder(folder)
        (step, last) = runs.steps()[-1], runs.step_folder(runs.steps()[-1])
        runs.check(step)
        subject = find(str(folder))
        _, pairs = read_adapter(last / "adapter")
        model = subject.model()
        tensors = {name: p.numpy().tobytes() for name, p in model.named_parameters()}
        tensors |= {k: b"".join(x.numpy().tobytes() for x in pair) for k, pair in pairs.items()}
        moments = (last / "trainer/optimizer.safetensors").read_bytes()
        state = read_state(last / "trainer/state.json", step)
        assert subject.tokenizer.encode("Mia has 12 apples.")
        texts = subject.tokenizer.files, subject.config, subject.settings, subject.stop_ids
        return tensors, moments, state, texts

    return look


def look_at_cache(folder, docs):
    def look():
        cache = TeacherCache(folder, docs, "teacher", 3, 1.0, 50)
        return cache.complete, cache.ids.tobytes(), cache.beside.tobytes()

    return look


def look_at_evaluation(out):
    """A damaged line of samples is made again: it must be missing, not another."""
    rows_before = {}

    def look():
        (about,) = out.glob("*/*.json")
        samples = summary.Samples(about.parent, about.stem)
        kept = samples.read(again=True)
        rows_before.update(kept if not rows_before else {})
        for key, row in kept.items():  # of a name of the checksum that was hit there is one more
            assert rows_before[key].items() <= row.items() and len(row) <= len(rows_before[key]) + 1
        report = summary.read_report(out / "summary.json")
        stated = summary.read_about(about)
        parts = [stated[name] for name in ("identity", "about", "generated")]
        return samples.read().keys(), parts, report

    return look


def small_evaluation(out, folder, capsys):
    argv = [folder, "--tasks=word_problems", "--limit=6", "--n=2", "--max_tokens=4"]
    code, _, error = command(capsys)(*argv, f"--out={out}")
    assert code == 0, error
    for name in ("summary.md", "summary.png"):  # never read back
        (out / name).unlink()


def campaign(name, run, tmp_path, capsys):
    """(the folder that is damaged, what reads it)."""
    if name == "checkpoint":
        folder = shutil.copytree(run, tmp_path / "r") / "checkpoints" / "step-2"
        return folder, look_at_run(tmp_path / "r")
    if name == "cache":
        docs = documents(200)
        filled(tmp_path / "c", docs)
        return tmp_path / "c", look_at_cache(tmp_path / "c", docs)
    small_evaluation(tmp_path / "out", checkpoint(tmp_path / "tiny"), capsys)
    return tmp_path / "out", look_at_evaluation(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint", "cache", "evaluation"])
def test_five_hundred_flips_and_a_hundred_cuts(name, run, tmp_path, capsys):
    folder, look = campaign(name, run, tmp_path, capsys)
    counts, silent = damaged(folder, look, random.Random(name + SEED), 500, 100)
    print(name, counts)
    assert not silent and sum(counts.values()) == 600


@pytest.mark.parametrize("name", ["checkpoint", "cache", "evaluation"])
def test_a_flip_in_any_file_is_refused_or_harmless(name, run, tmp_path, capsys):
    folder, look = campaign(name, run, tmp_path, capsys)
    files = sum(p.is_file() for p in folder.rglob("*"))
    counts, silent = damaged(folder, look, random.Random(1), files, files // 2)
    assert not silent and counts["refused"] > counts["harmless"]


# --- hostile values -------------------------------------------------------------------------------

VALUES = [None, True, False, -1, 0, 1, 3, 10**12, 10**400, 2**63, -0.5, 1e-320, 1e308, float("inf")]
VALUES += [float("nan"), -float("inf"), -0.0, 3.0, 2**31, 2**53 + 1, -(2**63) - 1, 2.5, 10**4000]
VALUES += ["", "x", "a\nb", "\ud800", "a\0b", "../x", "/etc/passwd", "y" * 300, "²", "\U0010fffd"]
VALUES += [
    "3",
    "٣",
    "1e400",
    "NaN",
    "true",
    " ",
    "\ufeffx",
    "\u202ex",
    "\u2028",
    "/dev/zero",
    "y" * 5000,
]
VALUES += [[], {}, [1], ["x"], {"a": 1}, [[]], [None], [10**12] * 3, {"": None}]
VALUES += [
    [1, "x", None, 2.5, {}, [True]],
    [float("nan")],
    [3.0, 2],
    {"a": {"b": {"c": [1]}}},
    [0] * 3000,
]
VALUES += [json.loads("[" * 150 + "]" * 150), {str(i): i for i in range(1000)}]


def places(value, path=()):
    """The paths of all parts of a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(items)[:40]:
            found += places(part, (*path, key))
    return found


def mutated(value, rng):
    """The value with some of its parts replaced, taken out or doubled."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 4))):
        *path, last = rng.choice(places(value)[1:] or [("new",)])
        parent = value
        for key in path:
            parent = parent[key]
        if not isinstance(parent, dict | list):
            continue
        change = rng.randrange(12)
        if change == 0 and last in (parent if isinstance(parent, dict) else range(len(parent))):
            parent.pop(last)
        elif change == 1 and isinstance(parent, dict):
            parent[rng.choice(["x", "\ud800", "n" * 400, ""])] = copy.deepcopy(rng.choice(VALUES))
        elif change == 2 and isinstance(parent, list):
            parent.append(copy.deepcopy(rng.choice(VALUES)))
        elif change < 7 and last != "new":
            parent[last] = twisted(parent[last], value, rng)
        else:
            parent[last] = copy.deepcopy(rng.choice(VALUES))
    return value


def twisted(part, whole, rng):
    """Nearly the same part of a value: of another type, wrapped, repeated, or from elsewhere."""
    kind = rng.randrange(6)
    if kind == 0:
        return [part]
    if kind == 1:
        for key in rng.choice(places(whole)):
            whole = whole[key]
        return copy.deepcopy(whole)
    if isinstance(part, list):
        return part * rng.choice((2, 20)) if kind < 4 else dict(enumerate(part))
    if isinstance(part, dict):
        return list(part) if kind < 4 else list(part.values())
    if isinstance(part, str):
        place = rng.randrange(len(part) + 1)
        odd = rng.choice(
            ["\0", "\ufeff", "\ud800", "\n", "\u2029", "{", "<|im_end|>", "x" * 300, "١"]
        )
        return part[:place] + odd + part[place:] if kind < 5 else list(part[:9])
    if isinstance(part, int | float) and abs(part) < 1e300:
        return [str(part), part + 0.5, float(part), -part, part * 10**6 + 1, part + 1][kind]
    return str(part)


def hostile(content, rng):
    """The bytes of a JSON file, changed: its values, mostly, else its bytes."""
    kind = rng.randrange(12)
    if kind < 7:
        return json.dumps(mutated(json.loads(content), rng)).encode()
    if kind == 7:
        return content[: rng.randrange(len(content))]
    if kind == 8:
        deep, pair = rng.choice((150, 3000, 200_000)), rng.choice((b"[]", b'{"a":}'))
        return b'{"a": ' + pair[:-1] * deep + b"1" + pair[-1:] * deep + b"}"
    if kind == 9:
        return spoiled(content, rng)
    changed = bytearray(content)
    for _ in range(rng.choice((1, 8))):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def spoiled(content, rng):
    """A file that no program of ours wrote: names twice, marks, other encodings, long numbers."""
    text = content.decode()
    colon = text.find(":", rng.randrange(len(text)))
    number = rng.choice(
        ["1e999999", "9" * 5000, "-0", "0x10", "1_000", "+1", "01", ".5", "NaN", "1e5"]
    )
    choices = [
        text[: text.index("{") + 1] + text[text.index("{") + 1 : text.rindex("}")] + "," + text[1:],
        text + text,
        text + "\0",
        "\ufeff" + text,
        text.replace("\n", "\r\n").replace(" ", "\u00a0", 1),
        text[: colon + 1] + number + "," + text[colon + 1 :],
        text.replace('"', "'"),
        "[" + text + "]",
        text.replace("{", '{"__proto__": {}, ', 3),
        " " * 9000 + text,
        "",
        "\n",
        "null",
    ]
    chosen = rng.choice(choices)
    encoding = rng.choice(["utf-8"] * 6 + ["utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"])
    return chosen.encode(encoding, "replace")


def outcome(read, capfd):
    """The exit code of a command that reads, after the checks that all of them have to pass."""

    def alarm(*_):
        raise TimeoutError("a hang")

    before = [signal.signal(number, alarm) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, 10)  # seconds of computing
    signal.alarm(600)  # and of waiting, on whatever machine
    try:
        code = as_command("test", read)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])
    error = capfd.readouterr().err
    assert code in (0, 1, 2) and error.count("\n") == bool(code), (code, error)
    assert "a hang" not in error
    return code


def fuzz(path, read, count, capfd, name):
    """Give a file hostile contents; {exit code: how often}."""
    rng, content, codes = random.Random(name + SEED), path.read_bytes(), {}
    for i in range(count):
        path.write_bytes(hostile(content, rng))
        try:
            code = outcome(read, capfd)
        except BaseException as e:
            raise AssertionError(f"{name} {i}: {path.read_bytes()[:600]!r}") from e
        codes[code] = codes.get(code, 0) + 1
    path.write_bytes(content)
    return codes


def fuzzed(kind, folder):
    """[(file, what reads it)] of a kind of files of a checkpoint."""

    def load():
        subject = find(str(folder))
        subject.model()

    def text():
        tokenizer = find(str(folder)).tokenizer
        ids = tokenizer.encode(tokenizer.escape("Mia <|im_end|> has 12 apples."))
        tokenizer.decode(ids, skip_special=True, before=ids[:2])
        if tokenizer.chat_template:
            tokenizer.render([{"role": "user", "content": "a"}], generate=True)

    files = {
        "config": (["config.json", "generation_config.json"], load),
        "index": (["model.safetensors.index.json"], load),
        "adapter": (["adapter_config.json"], load),
        "tokenizer": (["tokenizer.json", "tokenizer_config.json"], text),
        "record": (["trained_on.json"], load),
    }[kind]
    return [(folder / name, files[1]) for name in files[0]]


def prepared(kind, run, tmp_path):
    """A checkpoint without digests, in the form that has this kind of files."""
    folder = shutil.copytree(run / "checkpoints/step-2", tmp_path / "c")
    for sums in list(folder.rglob(digests.SUMS)):
        sums.unlink()
    if kind == "index":
        weights = folder / "model.safetensors"
        weights.rename(folder / "model-00001-of-00001.safetensors")
        from safetensors import safe_open

        with safe_open(folder / "model-00001-of-00001.safetensors", "pt") as tensors:
            names = dict.fromkeys(tensors.keys(), "model-00001-of-00001.safetensors")
        index = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if kind == "adapter":
        return folder / "adapter"
    return folder


KINDS = ["config", "index", "adapter", "tokenizer", "record"]


def fuzz_kind(kind, run, tmp_path, capfd, count):
    folder = prepared(kind, run, tmp_path)
    if kind == "adapter":  # its base lies beside it
        for path in folder.parent.glob("*"):
            if path.is_file() and path.name != "trained_on.json":
                shutil.copy(path, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = ""
        (folder / "adapter_config.json").write_text(json.dumps(config))
    codes = {}
    for path, read in fuzzed(kind, folder):
        for code, number in fuzz(path, read, count, capfd, path.name).items():
            codes[code] = codes.get(code, 0) + number
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_thousand_hostile_files(kind, run, tmp_path, capfd):
    codes = fuzz_kind(kind, run, tmp_path, capfd, int(2000 * TIMES))
    with capfd.disabled():
        print(kind, codes)
    assert codes[2] > 100 * TIMES


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_one_line(kind, run, tmp_path, capfd):
    assert fuzz_kind(kind, run, tmp_path, capfd, 15)[2]


# --- the trainer's state --------------------------------------------------------------------------

COUNTERS = {"tokens": 9, "flops": 10**20, "skipped": 0, "no_gradient": 1}
SAMPLE = {
    "tokens": [1, 2, 3],
    "weights": [0.0, 1.0, 1.0],
    "fields": {"advantage": [0.0, 0.5, 0.5]},
    "teacher_tokens": [4, 2, 3],
    "teacher": 0,
    "normalizer_weight": None,
}
DATA = {"consumed": 2}
ROLLOUTS = {"position": 8, "number": 1, "world": 1, "pending": [[SAMPLE, SAMPLE], [SAMPLE]]}
SOURCES = [DATA, ROLLOUTS, {"count": 2, "sources": [DATA, ROLLOUTS]}]


def load_state(path):
    """Read a trainer's state as a run on resuming does, but for the models."""
    config, shape = SimpleNamespace(world=1), SimpleNamespace(vocab_size=50)
    generator = SimpleNamespace(config=shape)
    dataset = SimpleNamespace(teachers=())
    rollouts = SimpleNamespace(config=config, generator=generator, dataset=dataset, pending=[])
    rollouts.load = partial(Rollouts.load, rollouts)
    data = SimpleNamespace()
    data.load = partial(DataStream.load, data)
    mixed = SimpleNamespace(sources=(data, rollouts))
    saved = read_state(path, 3)["source"][0]
    if "sources" in saved or "count" in saved:
        MixedSource.load(mixed, saved)
    elif "consumed" in saved:
        data.load(saved)
    else:
        rollouts.load(saved)
    for batch in rollouts.pending:
        list(batch.split(100))


def test_samples_of_each_of_several_teachers_are_read(tmp_path):
    """In grpo the rollouts' own `teachers` are none: the loss asks them."""
    second = SAMPLE | {"teacher": 1}
    fields = {"world": 1, "position": 1, "pending": [[second]]}
    rollouts = SimpleNamespace(
        config=SimpleNamespace(world=1),
        generator=SimpleNamespace(config=SimpleNamespace(vocab_size=50)),
        dataset=SimpleNamespace(teachers=["a", "b"]),
        teachers=(),
    )
    Rollouts.load(rollouts, fields)
    assert rollouts.pending[0].documents[0].teacher == 1
    rollouts.dataset.teachers = ["a"]
    with pytest.raises(UserError, match="another teacher"):
        Rollouts.load(rollouts, fields)


def fuzz_states(tmp_path, capfd, count):
    codes, path = {}, tmp_path / "state.json"
    for number, source in enumerate(SOURCES):
        path.write_text(json.dumps({"source": [source], "counters": COUNTERS}))
        load_state(path)
        for code, n in fuzz(
            path, partial(load_state, path), count, capfd, f"state {number}"
        ).items():
            codes[code] = codes.get(code, 0) + n
    return codes


@pytest.mark.slow
def test_two_thousand_hostile_states(tmp_path, capfd):
    codes = fuzz_states(tmp_path, capfd, int(700 * TIMES))
    with capfd.disabled():
        print("state", codes)
    assert codes[2] > 1000 * TIMES


def test_hostile_states_are_one_line(tmp_path, capfd):
    assert fuzz_states(tmp_path, capfd, 30)[2] > 40


def resumed(own, capsys):
    """Resume a run whose last checkpoint was changed by hand: the one line of its refusal."""
    for sums in list(own.rglob(digests.SUMS)):
        sums.unlink()
    files = {p: p.read_bytes() for p in own.rglob("*") if p.is_file() and p.name != ".lock"}
    code = train.main([f"--runs={own.parent}", "--name=r", "--resume", "--steps=3"])
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1, error
    assert files == {p: p.read_bytes() for p in files}
    return error


NAME = "exp_avg_sq.layers.0.mlp.up_proj.lora_B.weight"


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: {}, "tensor step.* is missing"),
        (lambda t: without(t, NAME), f"{NAME} is missing"),
        (lambda t: t | {NAME: t[NAME][:1]}, f"{NAME} is F32 of shape"),
        (lambda t: t | {NAME: t[NAME].half()}, f"{NAME} is F16"),
        (lambda t: t | {"exp_avg.other": t[NAME] + 0}, "unexpected tensor exp_avg.other"),
        (lambda t: t | {NAME.replace("exp", "x"): t[NAME] + 0}, "unexpected tensor x_avg"),
        (lambda t: t | {NAME: t[NAME] * float("nan")}, f"{NAME} holds numbers"),
        (lambda t: t | {NAME: t[NAME] - 1}, f"{NAME} holds numbers"),
        (lambda t: t | {NAME.replace("exp_avg_sq", "step"): torch.tensor(0.5)}, "step.* holds"),
        (lambda t: t | {NAME.replace("exp_avg_sq", "step"): torch.tensor(9.0)}, "step.* holds"),
    ],
)
def test_an_optimizer_of_other_parameters_or_numbers_is_refused(change, words, own, capsys):
    path = own / "checkpoints/step-2/trainer/optimizer.safetensors"
    save_file(change(load_file(path)), path)
    error = resumed(own, capsys)
    assert re.search(words, error) and str(path) in error


def test_a_run_that_never_updated_goes_on_without_moments(own, tmp_path):
    """Stopped before its first update, as by a signal: no moments are right."""
    folder = own / "checkpoints/step-2"
    for sums in list(own.rglob(digests.SUMS)):
        sums.unlink()
    state = json.loads((folder / "trainer/state.json").read_text())
    state["counters"]["skipped"] = 2
    (folder / "trainer/state.json").write_text(json.dumps(state))
    save_file({}, folder / "trainer/optimizer.safetensors")
    assert train.main([f"--runs={tmp_path}", "--name=r", "--resume", "--steps=3"]) == 0


def test_an_average_that_is_needed_is_not_begun_anew(tmp_path, capsys):
    argv = "--mode=kd --teacher=self_average --device=cpu --batch_size=2 --eval_examples=0"
    argv += f" --data=word_problems:4 --steps=1 --runs={tmp_path} --name=r"
    assert train.main(argv.split()) == 0
    path = tmp_path / "r/checkpoints/step-1/trainer/optimizer.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.startswith("average.")}, path)
    assert "average." in resumed(tmp_path / "r", capsys)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "trainer/state.json", "adapter/adapter_config.json"]
)
def test_a_changed_file_of_a_checkpoint_is_refused_by_name(name, own, capsys):
    path = own / "checkpoints/step-2" / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert train.main([f"--runs={own.parent}", "--name=r", "--resume", "--steps=3"]) == 2
    error = capsys.readouterr().err
    assert f"{path} is damaged" in error and "goes on from the checkpoint before" in error
    shutil.rmtree(own / "checkpoints/step-2")
    assert train.main([f"--runs={own.parent}", "--name=r", "--resume", "--steps=3"]) == 0


def test_what_is_trained_from_and_evaluated_is_looked_at_too(own, tmp_path, capsys):
    last = own / "checkpoints/step-2"
    with open(last / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        find(str(own))
    argv = f"--mode=sft --model={last} --device=cpu --steps=1 --eval_examples=0 --runs={tmp_path}/n"
    assert train.main(argv.split()) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err
    (last / digests.SUMS).unlink()  # changed on purpose
    assert find(str(own)).model()


def test_the_digests_are_those_of_sha256sum(own):
    for place in ("", "trainer", "adapter"):
        folder = own / "checkpoints/step-2" / place
        names = {p.name for p in folder.iterdir() if p.is_file()} - {digests.SUMS}
        assert names == {p.name for p in digests.verify(folder)} != set()
        command = ["sha256sum", "--strict", "-c", digests.SUMS]
        assert subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


def test_a_checkpoint_is_read_once_for_its_digests(own, monkeypatch):
    read = []

    def counted(path, *more):
        read.append(path)
        return file_sha256(path, *more)

    file_sha256 = digests.file_sha256
    monkeypatch.setattr(digests, "file_sha256", counted)
    folder = own / "checkpoints/step-2"
    assert verified(folder) == digests.verify(folder)
    assert len(read) == 2 * len(set(read))  # once by each of the two


# --- a run's checkpoints while others read them ---------------------------------------------------


def save(folder, step):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())

    def write(place):
        (place / "config.json").write_text("{}")

    RunFolder(folder, max_checkpoints=1).save(step, model, optimizer, write, {"n": step})


def test_a_checkpoint_in_use_stays_until_it_is_let_go(tmp_path):
    save(tmp_path, 1)
    with use(tmp_path / "checkpoints/step-1/config.json"):
        save(tmp_path, 2)
        assert RunFolder(tmp_path).steps() == [1, 2]
    save(tmp_path, 3)
    assert RunFolder(tmp_path).steps() == [3] and use(tmp_path / "step-1/config.json") is None


def test_an_evaluated_checkpoint_is_in_use_and_the_newest_there_is(own, monkeypatch):
    subject = find(str(own))
    with unused(own / "checkpoints/step-2/config.json") as is_free:
        assert not is_free
    subject.held.close()
    steps = RunFolder.steps

    def late(folder):  # step 2 is removed, and step 3 there, right after it was listed
        found = steps(folder)
        if found == [1, 2]:
            (own / "checkpoints/step-2").rename(own / "checkpoints/step-3")
        return found

    monkeypatch.setattr(RunFolder, "steps", late)
    assert find(str(own)).folder.name == "step-3"


def test_what_a_kill_leaves_of_a_removed_checkpoint_is_none(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def killed(path, **more):
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert RunFolder(tmp_path).steps() == [2]
    save(tmp_path, 3)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("name", ["step-²", "step-٣", "step-007", "step-", "step-1x", "step--1"])
def test_a_folder_with_another_name_is_no_checkpoint(name, tmp_path):
    (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert RunFolder(tmp_path).steps() == []


# --- what the operating system refuses ------------------------------------------------------------


@pytest.mark.parametrize(
    "number,code", [(errno.EACCES, 2), (errno.ENAMETOOLONG, 2), (errno.ENOSPC, 1), (errno.EIO, 1)]
)
def test_a_refusal_of_the_system_is_one_line(number, code, capsys):
    def run():
        raise OSError(number, os.strerror(number), "some\nfile")

    assert as_command("x", run, speaks=lambda line, is_own: is_own) == code
    assert capsys.readouterr().err == f"x: some file: {os.strerror(number)}\n"


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_what_is_no_file_is_never_read(kind, own, tmp_path, monkeypatch):
    """A pipe would be waited for, and some devices have no end."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "odd"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    else:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind("odd")
    words = f"{path} is a pipe, a device or a socket, not a file"

    for read in (files.read_head, files.read_bytes, files.read_json):
        with pytest.raises(UserError, match=words), within(5):
            read(path)
    log = own / "metrics.jsonl"
    log.unlink()
    path.rename(log)
    for read in (lambda: read_metrics(own), lambda: cut_back(log, 2)):
        with pytest.raises(UserError, match=f"{log} is a pipe, a device or a socket"), within(5):
            read()
    samples = summary.Samples(own, "metrics")
    with pytest.raises(UserError, match=f"{log} is a pipe, a device or a socket"), within(5):
        samples.read()
    with within(5):
        assert not is_held(log)
    sums = own / "checkpoints/step-2" / digests.SUMS
    sums.unlink()
    weights = own / "checkpoints/step-2/more.safetensors"
    log.rename(weights)
    for read in (lambda: weights_mark(weights.parent), lambda: find(str(own)).label):
        with pytest.raises(UserError, match="more.safetensors is a pipe, a device"), within(5):
            read()
    weights.rename(sums)
    with pytest.raises(UserError, match=f"{sums} is a pipe, a device or a socket"), within(5):
        find(str(own))


def test_links_in_a_circle_are_one_line(tmp_path, capsys):
    path = tmp_path / "circle"
    path.symlink_to(path)
    for main, other in ((evaluate.main, "--tasks=word_problems"), (compare.main, str(tmp_path))):
        assert main([str(path), other]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "circle" in error


def test_names_without_an_encoding_are_said(capsys):
    say("a\udcffb")
    assert capsys.readouterr().out == "a\\udcffb\n"


@pytest.mark.parametrize("argv", ["--data=word_problems:²", "--name={long}", "--runs={long}/x"])
def test_names_that_cannot_be_are_one_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = argv.format(long="n" * 300)
    assert train.main(["--mode=sft", "--device=cpu", "--steps=1", argv]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_drafts_are_of_a_process_and_those_of_the_dead_go(tmp_path):
    path = tmp_path / "a[1].json"
    dead = subprocess.Popen(["true"])
    dead.wait()
    other = draft_of(path)
    left = other.with_name(other.name.replace(f"-{os.getpid()}.", f"-{dead.pid}."))
    # a host whose name begins like this one's has processes of its own
    foreign = left.with_name(left.name.replace(f"-{dead.pid}.", f"-2-{dead.pid}."))
    for draft in (left, foreign, tmp_path / "b.json.draft"):
        draft.write_text("")
    replace_file(path, "x")
    assert {p.name for p in tmp_path.iterdir()} == {path.name, foreign.name, "b.json.draft"}


def test_a_container_leaves_the_drafts_of_others_alone(tmp_path, monkeypatch):
    """Its process ids are its own, though it may have the name of its host."""
    path = tmp_path / "a.json"
    dead = subprocess.Popen(["true"])
    dead.wait()
    monkeypatch.setattr(files, "OUTERMOST", 0)  # so this is a container
    inside = draft_of(path)
    theirs = path.with_name(f"{path.name}.{socket.gethostname()}-{dead.pid}.draft")
    theirs.write_text("")
    assert draft_of(path) == inside and theirs.exists()
    monkeypatch.setattr(files, "OUTERMOST", os.stat("/proc/self/ns/pid").st_ino)
    assert draft_of(path) != inside and not theirs.exists()


def test_an_interrupt_before_a_command_begins_is_one_line():
    code = "import errors; raise KeyboardInterrupt"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == "interrupted before it began\n"
    assert result.returncode == -signal.SIGINT


@pytest.mark.parametrize(
    "argv", ["{", "{" * 3000, '{"a": 1, "a": 2}', '{"a": ' + "[" * 300 + "]" * 300]
)
def test_odd_arguments_of_a_template_are_one_line(argv):
    with pytest.raises(UserError, match="--chat_template_kwargs: not valid JSON"):
        parse_template_kwargs(argv)


@pytest.mark.parametrize("place", ["made", "question"])
@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([10**8] * 2, pyarrow.date32()),
        pyarrow.array([1] * 2, pyarrow.timestamp("ns")),
        pyarrow.array([1] * 2, pyarrow.timestamp("us", tz="Nowhere/City")),
        pyarrow.array([b"\xff"] * 2).view(pyarrow.string()),
    ],
)
def test_a_column_that_python_cannot_hold_is_named(column, place, tmp_path):
    rows = {name: pyarrow.array(["a", "b"]) for name in ("question", "answer")}
    pyarrow.parquet.write_table(pyarrow.table(rows | {place: column}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=f"d.parquet: column '{place}' .* cannot be read") as e:
        read_examples(tmp_path / "d.parquet", "train")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["num_hidden_layers", "hidden_size", "vocab_size", "intermediate_size", "head_dim"]
)
def test_a_size_that_nothing_has_is_refused_before_it_is_tried(name, run):
    settings = json.loads((run / "checkpoints/step-2/config.json").read_text())
    assert config_from_hf(settings, "here")
    for size in (0, -1, 10**12, 10**400, 1.5, True, "2", [2]):
        with pytest.raises(UserError, match=f"here: config.json has {name} .*a whole number from"):
            config_from_hf(settings | {name: size}, "here")
