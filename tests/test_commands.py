"""The parser as commands without conditions use it: positional words, lists, pairs, switches."""

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import pytest

import eval.study.__main__ as study
import options
import train
from data import download
from errors import UserError
from eval import __main__ as evaluation
from eval import chat, compare, divergence, traces
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


# --- every command --------------------------------------------------------------------------------


class Command(NamedTuple):
    """A command, its options, and the least that its command line must give."""

    main: Callable[[list[str]], int]
    options: type
    argv: str = ""


COMMANDS = {
    "train.py": Command(train.main, train.Config),
    "eval": Command(evaluation.main, evaluation.EvalOptions, "run --tasks=gsm8k"),
    "eval.traces": Command(traces.main, traces.TraceOptions, "run --data=x --out=y"),
    "eval.chat": Command(chat.main, chat.ChatOptions, "run"),
    "eval.compare": Command(compare.main, compare.CompareOptions, "runs/a runs/b"),
    "eval.divergence": Command(
        divergence.main, divergence.DivergenceOptions, "a b --evals x y --out=z"
    ),
    "eval.study": Command(study.main, study.StudyOptions, "study.toml"),
    "data.download": Command(download.main, download.DownloadOptions, "gsm8k"),
}


@pytest.fixture(params=COMMANDS)
def name(request):
    return request.param


@pytest.fixture
def refusal(name, capsys):
    """A function that returns the line with which the command refuses one more argument."""

    def run(argument):
        command = COMMANDS[name]
        assert command.main([*command.argv.split(), argument]) == 2
        out, error = capsys.readouterr()
        assert error.startswith(f"{name}: ") and error.count("\n") == 1 and not out
        return error

    return run


def optional(name):
    """{name: type} of a command's options, without its positional words."""
    named = {}
    for spec in dataclasses.fields(COMMANDS[name].options):
        if not spec.metadata["rules"].positional:
            named[spec.name] = bool if spec.name == "resume" else spec.type
    return named


def test_an_unknown_option_is_refused_with_the_nearest_name(name, refusal):
    longest = max(optional(name), key=len)
    assert f"--{longest}x is not an option; did you mean {longest}?" in refusal(f"--{longest}x=1")


def test_both_spellings_of_an_option_without_its_value_are_refused(name, refusal):
    valued = [key for key, kind in optional(name).items() if kind is not bool]
    assert valued
    for key in valued:
        for spelling in (key, key.replace("_", "-")):
            assert f"--{key}: expected " in refusal(f"--{spelling}")


def test_bad_numbers_are_refused(name, refusal):
    kinds = {int: "a whole number", float: "a number", tuple[int, ...]: "a whole number"}
    numbers = {key: kind for key, kind in optional(name).items() if kind in kinds}
    assert numbers or name in ("data.download", "eval.compare")
    for key, kind in numbers.items():
        assert f"--{key}: 'many' is not {kinds[kind]}" in refusal(f"--{key}=many")


def test_help_names_every_option(name, capsys):
    with pytest.raises(SystemExit) as e:
        COMMANDS[name].main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and all(len(line) <= 100 for line in out.splitlines())
    assert all(f"  --{key} " in out for key in optional(name))
    for spec in dataclasses.fields(COMMANDS[name].options):
        assert spec.name in optional(name) or f"  {spec.name.upper()} " in out


def test_torchrun_takes_n_for_its_own_so_that_samples_is_the_same_option():
    for parse, argv in (
        (evaluation.parse, ["run", "--tasks=gsm8k"]),
        (traces.parse, ["run", "--data=x", "--out=y"]),
    ):
        assert parse([*argv, "--samples", "3"]) == parse([*argv, "--n=3"]) != parse(argv)
