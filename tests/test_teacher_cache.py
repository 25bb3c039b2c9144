"""Training from a cached top-k is training with the teacher; a wrong cache is refused."""

import functools
import json
import os
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import options
import prepare
import toy_models
import train
from data.batch import Batch, Document, GlobalBatch
from data.teacher_cache import TeacherCache
from errors import Halted, RunFailed, UserError
from files import draft_of
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
from losses.kd import DIVERGENCES
from tests import reference


def documents(count=5, seed=0):
    rng = np.random.default_rng(seed)
    made = [
        Document(rng.integers(50, size=n), (np.arange(n) > n // 3).astype(float))
        for n in rng.integers(3, 12, size=count)
    ]
    made.append(Document(np.arange(4), np.zeros(4)))  # nothing of it is trained on
    return made


def filled(folder, docs, k=3, cut=2):
    cache = TeacherCache(folder, docs, "teacher", k, 1.0, 50)
    rows = cache.positions
    ids, logp = (
        np.arange(rows * k).reshape(rows, k) % 50,
        np.log(np.random.default_rng(1).dirichlet(np.ones(k + 1), rows)),
    )
    cache.fill(lambda _: ((ids[lo : lo + cut], logp[lo : lo + cut]) for lo in range(0, rows, cut)))
    return cache, ids, logp


def test_every_position_gets_its_own_rows(tmp_path):
    docs = documents()
    _, ids, logp = filled(tmp_path / "c", docs)
    cache = TeacherCache(tmp_path / "c", docs, "teacher", 3, 1.0, 50)
    assert cache.complete
    listed = [Document(d.tokens, d.weights, teacher_topk=cache[i]) for i, d in enumerate(docs)]
    for micro in (
        Batch.pack(listed),
        *GlobalBatch(listed[::-1]).split(14),
    ):  # packed in whatever order
        start = np.cumsum([0, *(np.count_nonzero(d.weights) for d in docs)])
        of = {d.tokens.tobytes(): i for i, d in enumerate(docs)}
        rows = np.concatenate(
            [
                np.arange(start[of[d.tokens.tobytes()]], start[of[d.tokens.tobytes()] + 1])
                for d in micro.documents
            ]
        )
        assert len(micro.rows_N) == len(rows)
        assert np.array_equal(micro.topk_ids_Nk.numpy(), ids[rows])
        torch.testing.assert_close(
            micro.topk_logp_NB.double(), torch.from_numpy(logp[rows]), rtol=0, atol=6e-3
        )
        assert torch.allclose(micro.topk_logp_NB.exp().sum(1), torch.ones(len(rows)))
    assert Batch.pack([listed[0], docs[1]]).topk_ids_Nk is None


@pytest.mark.parametrize(
    "change",
    ["token", "weight", "k", "temperature", "teacher", "vocab", "truncated", "no json", "garbage"],
)
def test_what_does_not_fit_is_refused(change, tmp_path):
    docs, k, temperature, teacher, vocab = documents(), 3, 1.0, "teacher", 50
    filled(tmp_path / "c", docs)
    if change == "token":
        docs[2].tokens[1] += 1
    if change == "weight":
        docs[2].weights[-1] = 0
    if change == "truncated":
        with open(tmp_path / "c" / "ids.npy", "r+b") as f:
            f.truncate(140)
    if change == "no json":
        (tmp_path / "c" / "cache.json").unlink()
        assert not TeacherCache(tmp_path / "c", docs, teacher, k, temperature, vocab).complete
        return
    if change == "garbage":
        (tmp_path / "c" / "cache.json").write_text("[1]")
    k, temperature, teacher, vocab = (
        k + (change == "k"),
        temperature + (change == "temperature"),
        teacher + "!" * (change == "teacher"),
        vocab + (change == "vocab"),
    )
    with pytest.raises(UserError, match="--kd_cache") as e:
        TeacherCache(tmp_path / "c", docs, teacher, k, temperature, vocab)
    assert "\n" not in str(e.value)


def run(tmp_path, name, *given):
    argv = [
        "--mode=kd",
        "--teacher=random:tiny-teacher",
        "--kd_signal=topk",
        "--data=word_problems:20",
        "--steps=3",
        "--batch_size=4",
        "--eval_examples=0",
        "--dtype=float32",
        f"--runs={tmp_path}",
        f"--name={name}",
        *given,
    ]
    assert train.main(argv) == 0
    return [
        json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize("k", [8, toy_models.toy_tokenizer().size])
def test_training_from_it_is_training_with_the_teacher(k, tmp_path, monkeypatch):
    with_teacher = run(tmp_path, "with", f"--kd_topk={k}")
    first = run(tmp_path, "first", f"--kd_topk={k}", f"--kd_cache={tmp_path / 'c'}")
    import model.load

    built = []
    build = model.load.build_model
    monkeypatch.setattr(
        model.load, "build_model", lambda *a, **more: built.append(a) or build(*a, **more)
    )
    again = run(tmp_path, "again", f"--kd_topk={k}", f"--kd_cache={tmp_path / 'c'}")
    assert len(built) == 1  # the student alone
    for a, b, c in zip(with_teacher, first, again, strict=True):
        for key in ("train/loss", "train/grad_norm"):
            assert b[key] == c[key]
            assert b[key] == pytest.approx(a[key], rel=2e-3)  # what fp16 log-probs cost
    epoch = run(
        tmp_path, "epoch", f"--kd_topk={k}", "--steps=5"
    )  # 20 examples, each read once by the teacher: what filling the cache takes
    for rows in (first, again):
        assert [row["train/teacher_tokens"] for row in rows if "train/tokens" in row] == [
            epoch[-1]["train/teacher_tokens"]
        ] * 3
    assert first[-1]["train/flops"] == again[-1]["train/flops"] > with_teacher[-1]["train/flops"]


def test_a_shorter_list_costs_more(tmp_path):
    """The gradient's error falls with k, and at k = V it is the rounding of fp16."""
    hidden, head, th, tw = (
        x.double()
        for x in reference.near_pair(6, 2000, 16, torch.Generator().manual_seed(0), kl=2e-2)
    )
    hidden.requires_grad_()
    (want,) = torch.autograd.grad(
        reference.divergence("forward_kl", hidden @ head.T, th @ tw.T).sum(), hidden
    )
    errors = []
    for k in (8, 128, 2000):
        ids, logp = topk_logprobs(th, tw, k)
        kept = torch.from_numpy(
            np.maximum(logp.numpy(), -65504).astype(np.float16).astype(np.float64)
        ).log_softmax(1)
        loss, _ = linear_topk_divergence(
            hidden,
            head,
            ids,
            kept,
            torch.ones(6, dtype=torch.float64),
            lambda a, b: DIVERGENCES["forward_kl"](a, b, 0.5),
        )
        (got,) = torch.autograd.grad(loss, hidden)
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 2e-2, errors


def test_wrong_uses_are_one_line_before_weights_are_read(tmp_path, monkeypatch, capsys):
    def built(*_, **more):
        raise AssertionError("a model was built")

    monkeypatch.setattr("model.load.build_model", built)
    docs, other = documents(), tmp_path / "other"
    filled(other, docs)
    (tmp_path / "file").write_text("")
    topk, new = "--kd_signal=topk", f"--kd_cache={tmp_path / 'new'}"
    for number, (given, words) in enumerate(
        (
            ([topk, new, "--data=word_problems"], "word_problems is endless"),
            ([new], "kd_cache is not read with kd_signal=full"),
            ([topk, f"--kd_cache={other}"], "was made with other"),
            ([topk, f"--kd_cache={tmp_path / 'file'}"], "cannot be made"),
        )
    ):
        argv = [
            "--mode=kd",
            "--teacher=random:tiny-teacher",
            "--data=word_problems:20",
            "--eval_examples=0",
        ]
        argv += [f"--runs={tmp_path}", f"--name=r{number}", *given]
        assert train.main(argv) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_ranks_do_not_fill_it_together(tmp_path):
    cfg = options.parse(
        train.Config, ["--mode=kd", "--kd_signal=topk", f"--kd_cache={tmp_path / 'c'}"]
    )
    plan = SimpleNamespace(dataset=[], place=SimpleNamespace(world=2), vocab_size=50)
    teacher = SimpleNamespace(folder=None)
    with pytest.raises(UserError, match="is empty; fill it by one process first"):
        prepare.open_teacher_cache(cfg, plan, teacher)


def test_a_teacher_with_another_configuration_is_another_one(tmp_path):
    """The same weights compute something else with another rope_theta, say."""
    argv = ["--mode=kd", "--kd_signal=topk", f"--kd_cache={tmp_path / 'c'}"]
    cfg, docs = options.parse(train.Config, argv), documents()
    dataset = type("Docs", (), {"get": lambda _, i: docs[i], "__len__": lambda _: len(docs)})()
    plan = SimpleNamespace(dataset=dataset, place=SimpleNamespace(world=1), vocab_size=50)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    teacher = SimpleNamespace(folder=tmp_path, config="theta 1")
    filled_by = prepare.open_teacher_cache(cfg, plan, teacher).fingerprint["teacher"]
    teacher.config = "theta 2"
    assert prepare.open_teacher_cache(cfg, plan, teacher).fingerprint["teacher"] != filled_by


def test_nothing_is_left_of_a_filling_that_failed(tmp_path, monkeypatch):
    docs = documents()
    cache = TeacherCache(tmp_path / "c", docs, "teacher", 3, 1.0, 50)

    def rows(error):
        yield np.zeros((2, 3)), np.zeros((2, 4))
        raise error

    full = OSError(28, "No space left on device")
    for error, raised in ((full, RunFailed), (KeyboardInterrupt(), KeyboardInterrupt)):
        with pytest.raises(raised):
            cache.fill(lambda _, error=error: rows(error))
        assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="cannot be written"):
        cache.fill(lambda _: rows(PermissionError(13, "Permission denied")))
    (tmp_path / "c").mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    draft = draft_of(tmp_path / "c" / "ids.npy")
    draft.with_name(draft.name.replace(f"-{os.getpid()}.", f"-{dead.pid}.")).write_text("")
    TeacherCache(tmp_path / "c", docs, "teacher", 3, 1.0, 50)
    assert [p.name for p in (tmp_path / "c").iterdir()] == []


@pytest.mark.parametrize("draws_seed", [None, 0])
def test_a_filling_that_is_stopped_goes_on_where_it_was(draws_seed, tmp_path):
    docs, random = documents(), np.random.default_rng(1)
    open_cache = functools.partial(
        TeacherCache, documents=docs, teacher="t", k=3, temperature=1.0, vocab=50
    )
    rows = open_cache(tmp_path / "none").positions
    ids = random.integers(50, size=(rows, 3))
    logp = np.log(random.dirichlet(np.ones(4), rows))[:, : 4 if draws_seed is None else 0]
    pieces = [(ids[lo : lo + 2], logp[lo : lo + 2]) for lo in range(0, rows, 2)]
    asked = []

    def topk(done):
        asked.append(done)
        return iter(pieces[done:])

    def after(parts):
        left = [parts]

        def halt():
            left[0] -= 1
            if not left[0]:
                raise Halted("SIGTERM")

        return halt

    def fill(name, halt=lambda: None, tokens=100):
        cache = open_cache(tmp_path / name, draws_seed=draws_seed)
        cache.fill(topk, halt, tokens)
        return cache

    def contents(name):
        return {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}

    fill("whole")
    for parts in (2, 1):
        with pytest.raises(RunFailed, match=r"^stopped by SIGTERM: \d+ of \d+ positions are kept"):
            fill("cut", after(parts))
        assert not open_cache(tmp_path / "cut", draws_seed=draws_seed).complete
    assert fill("cut").complete
    assert asked == [0, 0, 2, 3] and contents("cut") == contents("whole")

    asked.clear()
    for name, tokens, spoil in (("other", 50, 0), ("damaged", 100, 1)):  # begun again
        with pytest.raises(RunFailed):
            fill(name, after(2))
        part = tmp_path / name / "ids.npy.part"
        part.write_bytes(part.read_bytes()[: -4 * spoil or None])
        fill(name, tokens=tokens)
        assert contents(name) == contents("whole")
    assert asked == [0, 0, 0, 0]


def test_of_two_that_fill_it_the_second_takes_what_is_there(tmp_path):
    docs = documents()
    second = TeacherCache(tmp_path / "c", docs, "teacher", 3, 1.0, 50)
    first, _, _ = filled(tmp_path / "c", docs)
    (tmp_path / "c" / ".lock").touch()  # as a process leaves it that is killed at the very end
    TeacherCache(tmp_path / "c", docs, "teacher", 3, 1.0, 50)
    assert not (tmp_path / "c" / ".lock").exists()
    second.fill(lambda _: ())
    assert second.complete and np.array_equal(second.ids, first.ids)


def test_a_cache_filled_before_digests_were_kept_is_read(tmp_path):
    docs = documents()
    filled(tmp_path / "c", docs)
    path = tmp_path / "c" / "cache.json"
    about = json.loads(path.read_text())
    assert set(about.pop("sha256")) == {"ids.npy", "logp.npy"}
    path.write_text(json.dumps(about))
    assert TeacherCache(tmp_path / "c", docs, "teacher", 3, 1.0, 50).complete
