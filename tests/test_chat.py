"""`python -m eval.chat` as it is run: a tiny random checkpoint, lines from a pipe."""

import subprocess
import sys

import train
from model.checkpoint import build_model, save_model
from model.transformer import PRESETS
from tests.conftest import ROOT


def chat(*arguments, lines=""):
    return subprocess.run([sys.executable, "-m", "eval.chat", *map(str, arguments)], cwd=ROOT, input=lines, capture_output=True, text=True)


def test_a_conversation_and_what_is_refused(tmp_path):
    tokenizer, run = train.embedded_tokenizer(), tmp_path / "run"
    folder = run / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    save_model(build_model(PRESETS["tiny"], None, device="cpu", seed=0), folder, tokenizer, [2, 0])
    lines = "Mia has 3 apples.\n\nAnd now?\n/new\nMia has 3 apples.\n"
    runs = [chat(f, "--logp", "--max_tokens=12", "--temperature", t, lines=lines) for f, t in ((run, 1), (folder, 1), (folder, 0))]
    assert all(r.returncode == 0 and not r.stderr for r in runs), runs[0].stderr
    assert runs[0].stdout == runs[1].stdout != runs[2].stdout
    assert runs[0].stdout.count("mean log-prob -") == 3 == runs[0].stdout.count("[12 tokens")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')  # no template: plain text
    assert chat(folder, "--max-tokens", 3, lines="a\nb\n").returncode == 0
    for arguments, words in (([tmp_path], "no config.json"), (["tiny"], "preset"), ([folder, "--tempo", 1], "--tempo"),
                             ([folder, "--temperature", -1], "negative"), ([], "checkpoint")):  # fmt: skip
        result = chat(*arguments, lines="a\n")
        assert result.returncode == 2 and words in result.stderr and result.stderr.count("\n") == 1, result.stderr
