"""How far a checkpoint is from another on the answers of both, against brute force in fp64."""

import json
import shutil

import pytest
import torch

import toy_models
from data.tokenizer import Tokenizer, build_tiny
from digests import with_sha256
from eval import __main__ as evaluation
from eval import divergence
from kernels.attention import PackedAttention
from model.checkpoint import build_model, read_config, save_model
from tests.evaluation import checkpoint, read_lines

ASKED = [
    "--tasks=word_problems",
    "--limit=4",
    "--n=2",
    "--k=1",
    "--temperature=1",
    "--max_tokens=9",
    "--system=Be brief.",
    "--instruction= Think.",
    "--prefill=So",
]
MEASURES = {
    "forward_kl",
    "reverse_kl",
    "top1",
    "entropy",
    "teacher_entropy",
    "forward_kl_from_0",
    "forward_kl_per_answer",
    "reverse_kl_per_answer",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint, one near it, and their evaluations; some first samples made to end early."""
    home = tmp_path_factory.mktemp("made")
    base = checkpoint(home / "base")
    model = build_model(read_config("base", base), base, device="cpu", seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    (home / "near").mkdir()
    save_model(
        model, home / "near", toy_models.toy_tokenizer(), toy_models.toy_tokenizer().stop_ids()
    )
    for name in ("base", "near"):
        assert evaluation.main([str(home / name), *ASKED, f"--out={home}/evals-{name}"]) == 0
        (kept,) = (home / f"evals-{name}").glob("*/word_problems.jsonl")
        rows = read_lines(kept)
        for row in rows[::2]:
            row |= (
                {"text": f"{row['problem']} and #### 5", "stopped": True}
                if row["problem"] % 2
                else {}
            )
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def measured(home, out, *names, **more):
    argv = [str(home / n) for n in names] + [
        "--evals",
        *(str(home / f"evals-{n}") for n in names),
        f"--out={out}",
    ]
    return divergence.main([*argv, *(f"--{k}={v}" for k, v in more.items())])


def brute_force(home, author, limit):
    """The means on what `author` generated: the prompt's text by hand, every softmax in fp64."""
    models = [
        build_model(
            read_config(n, home / n), home / n, device="cpu", seed=0, weight_dtype=torch.float64
        )
        for n in ("near", "base")
    ]
    tokenizer, sums, count, answers = Tokenizer.load(home / "base"), {}, 0, 0
    (kept,) = (home / f"evals-{author}").glob("*/word_problems.jsonl")
    for row in map(json.loads, kept.read_text().splitlines()):
        if row["sample"] or row["problem"] >= limit:
            continue
        text = (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            f"<|im_start|>user\n{row['question']} Think.<|im_end|>\n<|im_start|>assistant\n"
        )
        prompt = tokenizer.encode(text) + tokenizer.encode("So")
        ids = (
            prompt
            + tokenizer.encode(row["text"])
            + tokenizer.encode("<|im_end|>" if row["stopped"] else "")
        )
        tokens = torch.tensor(ids)
        with torch.no_grad():
            s, t = (
                torch.softmax(
                    m(tokens, torch.arange(len(ids)), PackedAttention([len(ids)])) @ m.head_VD.t(),
                    1,
                )[len(prompt) - 1 : -1]
                for m in models
            )
        values = {
            "forward_kl": t * (t / s).log(),
            "reverse_kl": s * (s / t).log(),
            "entropy": -s * s.log(),
            "teacher_entropy": -t * t.log(),
        }
        values = {k: v.sum(1) for k, v in values.items()} | {
            "top1": (s.argmax(1) == t.argmax(1)).double()
        }
        sums = {k: sums.get(k, 0) + float(v.sum()) for k, v in values.items()}
        count, answers = count + len(s), answers + 1
    per_answer = {f"{k}_per_answer": sums[k] / answers for k in ("forward_kl", "reverse_kl")}
    return {k: v / count for k, v in sums.items()} | per_answer


@pytest.mark.parametrize("limit", [100, 2])
def test_the_measures_equal_brute_force(made, tmp_path, limit, capsys):
    assert measured(made, tmp_path / "new" / "kl.json", "near", "base", limit=limit) == 0
    got = json.loads((tmp_path / "new" / "kl.json").read_text())
    assert got.keys() == {"on_own", "on_reference"} and all(
        MEASURES <= got[name].keys() for name in got
    )
    for name, author in (("on_own", "near"), ("on_reference", "base")):
        want = brute_force(made, author, limit)
        assert {k: got[name][k] for k in want} == pytest.approx(want, rel=1e-5)
        assert 1e-3 < want["reverse_kl"] < 1 and want["reverse_kl"] != pytest.approx(
            want["forward_kl"], rel=1e-3
        )
    assert got["on_own"]["reverse_kl"] != pytest.approx(got["on_reference"]["reverse_kl"], rel=1e-3)
    assert f"{got['on_own']['reverse_kl']:.5f}" in capsys.readouterr().out


def test_a_checkpoint_is_not_far_from_itself(made, tmp_path):
    assert measured(made, tmp_path / "kl.json", "base", "base") == 0
    got = json.loads((tmp_path / "kl.json").read_text())
    assert (
        got["on_own"] == got["on_reference"]
        and got["on_own"]["top1"] == 1
        and got["on_own"]["entropy"] > 1
    )
    assert all(abs(v) < 1e-12 for k, v in got["on_own"].items() if "kl" in k)


@pytest.mark.parametrize(
    "wrong,said",
    [
        ("no evaluation", "no answers of"),
        ("another's", "no answers of"),
        ("merges", "different tokenizers"),
        ("tasks", "same tasks"),
        ("limit", "--limit must be at least 1"),
        ("few_shot", "few-shot prompts cannot"),
        ("unfinished", "an unfinished evaluation cannot"),
        ("question", "another prompt of the first"),
        ("out", "--out"),
    ],
)
def test_wrong_inputs_are_one_line(wrong, said, made, tmp_path, capsys):
    for name in ("evals-near", "evals-base"):
        shutil.copytree(made / name, tmp_path / name)
    own, other, (kept,), more = (
        tmp_path / "evals-near",
        made / "base",
        (tmp_path / "evals-near").glob("*/word_problems.jsonl"),
        [],
    )
    if wrong == "no evaluation":
        shutil.rmtree(own)
    elif wrong == "another's":
        own = tmp_path / "evals-base"
    elif wrong == "merges":
        other = checkpoint(
            tmp_path / "other", tokenizer=build_tiny(["other words, other merges"] * 5)
        )
    elif wrong == "tasks":
        kept.with_suffix(".json").rename(kept.with_name("gsm8k.json"))
        kept.rename(kept.with_name("gsm8k.jsonl"))
    elif wrong == "limit":
        more = ["--limit=0"]
    elif wrong == "few_shot":
        about = kept.with_suffix(".json")
        stated = json.loads(about.read_text())
        stated["identity"]["prompt"]["kind"] = "few_shot"
        about.write_text(json.dumps(with_sha256(stated)))
    elif wrong == "unfinished":
        kept.rename(kept.with_suffix(".part-0.jsonl"))
    elif wrong == "question":
        rows = [json.dumps(row).replace("How many", "How few") for row in read_lines(kept)]
        kept.write_text("\n".join(rows))
    out = kept / "kl.json" if wrong == "out" else tmp_path / "kl.json"
    capsys.readouterr()
    assert (
        divergence.main(
            [
                str(made / "near"),
                str(other),
                "--evals",
                str(own),
                str(tmp_path / "evals-base"),
                f"--out={out}",
                *more,
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "kl.json").exists()
