"""The parser as a command without conditions uses it: positional words, lists, pairs, switches."""

import dataclasses
from typing import Literal

import pytest

import options
from errors import UserError
from options import REQUIRED, option


@dataclasses.dataclass(frozen=True)
class Several:
    checkpoints: tuple[str, ...] = option(REQUIRED, "100 % of them", positional=True)
    tasks: tuple[str, ...] = option(REQUIRED, "test sets", choices=("gsm8k", "math500"))
    evals: tuple[str, str] = option(("", ""), "two folders")
    k: tuple[int, ...] = option((), "k of pass@k", minimum=1)
    samples: int = option(1, "samples per problem", alias="n", minimum=1, below=100)
    top_p: float = option(1.0, "mass", above=0, maximum=1)
    keep: Literal["right", "ended"] = option("right", "samples that are kept")
    greedy: bool = option(False, "the most probable token")
    system: str | None = option(None, "system prompt")


@dataclasses.dataclass(frozen=True)
class Pair:
    teacher: str = option(REQUIRED, "teacher", positional=True)
    kind: str = option(REQUIRED, "kind", positional=True, choices=("fast", "slow"))


def several(*argv):
    return options.parse(Several, argv)


def test_words_lists_pairs_switches_and_aliases():
    got = several("a", "b", "--tasks", "gsm8k, math500", "--n=4", "--greedy", "--evals", "x", "y")
    assert got.checkpoints == ("a", "b") and got.tasks == ("gsm8k", "math500")
    assert got.evals == ("x", "y") and got.samples == 4 and got.greedy and got.system is None
    got = several("--greedy", "a", "--tasks=gsm8k", "--k", "1,8", "--system=", "--top-p", "0.5")
    assert got.checkpoints == ("a",) and got.greedy and got.k == (1, 8)
    assert got.system == "" and got.top_p == 0.5 and got.keep == "right"
    assert options.parse(Pair, ["a", "slow"]) == Pair(teacher="a", kind="slow")


@pytest.mark.parametrize(
    "argv,words",
    [
        ("--tasks=gsm8k", "CHECKPOINTS"),
        ("a", "--tasks"),
        ("a --tasks=gsm9k", "--tasks: no 'gsm9k'; did you mean gsm8k?"),
        ("a --tsks=gsm8k", "--tsks is not an option; did you mean tasks?"),
        ("a --task=gsm8k", "--task is not an option"),
        ("a --tasks=gsm8k --k=1,x", "--k: 'x' is not a whole number"),
        ("a --tasks=gsm8k --k=0", "--k must be at least 1, not 0"),
        ("a --tasks=gsm8k --n=100", "--samples must be below 100, not 100"),
        ("a --tasks=gsm8k --top_p=0", "--top_p must be above 0, not 0.0"),
        ("a --tasks=gsm8k --top_p=1.1", "--top_p must be at most 1, not 1.1"),
        ("a --tasks=gsm8k --keep=wrong", "--keep: no 'wrong'; choose from right, ended"),
        ("a --tasks=gsm8k --evals x", "--evals: expected 2 arguments"),
        ("a --tasks=gsm8k --system", "--system: expected one argument"),
        ("a --tasks=gsm8k -x", "-x"),
    ],
)
def test_what_is_wrong_is_one_line(argv, words):
    with pytest.raises(UserError) as e:
        several(*argv.split())
    assert words in str(e.value) and "\n" not in str(e.value)


def test_one_word_too_few_too_many_or_wrong():
    for argv, words in ((["a"], "KIND"), (["a", "fast", "c"], "c"), (["a", "fats"], "KIND: no")):
        with pytest.raises(UserError, match=words):
            options.parse(Pair, argv)


def test_help_is_the_modules_docstring_and_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        several("--help")
    out = capsys.readouterr().out
    assert e.value.code == 0 and out.startswith(__doc__)
    assert "  CHECKPOINTS  " in out and "100 % of them" in out
    assert "samples that are kept (right | ended) [default right]" in out


def test_options_of_a_command_in_a_file(tmp_path):
    (tmp_path / "o.toml").write_text('n = 3\nk = "1,3"\ngreedy = true\n')
    got = several("a", "--tasks=gsm8k", f"--config={tmp_path}/o.toml", "--n=5")
    assert (got.samples, got.k, got.greedy) == (5, (1, 3), True)
