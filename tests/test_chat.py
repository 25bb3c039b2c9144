"""`python -m eval.chat` as it is run: a tiny random checkpoint, lines from a pipe."""

import io
import subprocess
import sys

import toy_models
from eval import chat
from model.checkpoint import build_model, save_model
from model.presets import PRESETS
from tests.conftest import ROOT

LINES = "Mia has 3 apples.\n\nAnd now?\n/new\nMia has 3 apples.\n"


def test_a_conversation_and_what_is_refused(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(LINES))
        code = chat.main([str(a) for a in arguments])
        return (code, *capsys.readouterr())

    tokenizer, folder = toy_models.toy_tokenizer(), tmp_path / "run" / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    save_model(build_model(PRESETS["tiny"], None, device="cpu", seed=0), folder, tokenizer, [2, 0])
    command = [sys.executable, "-m", "eval.chat", tmp_path / "run", "--logp", "--max_tokens=12"]
    command += ["--temperature", "1"]
    as_run = subprocess.run(command, cwd=ROOT, input=LINES.encode(), capture_output=True)
    assert as_run.returncode == 0
    assert as_run.stderr.decode() == f"talking to {folder}\n"
    text = as_run.stdout.decode()
    assert text.count("[12 tokens, mean log-prob -") == 3
    assert run(folder, "--logp", "--max-tokens=12", "--temperature", 1)[1] == text
    assert run(folder, "--logp", "--max-tokens=12", "--temperature", 0)[1] != text
    for arguments, words in (
        ([tmp_path], "no config.json"),
        (["tiny"], "preset"),
        ([folder, "--tempo", 1], "--tempo"),
        ([folder, "--temperature", -1], "--temperature must be at least 0"),
        ([], "CHECKPOINT"),
    ):
        code, _, error = run(*arguments)
        assert code == 2 and words in error and error.count("\n") == 1, error
    # without a template: plain text, and no arguments for one
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert run(folder, "--max-tokens", 3)[0] == 0
    code, _, error = run(folder, "--chat_template_kwargs", "x=1")
    assert code == 2 and "--chat_template_kwargs" in error and error.count("\n") == 1
