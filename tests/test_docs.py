"""The commands of README.md and of the guides, line by line: each exists and its options are right.

They name files that are not here, so they are parsed and checked, and not run.
"""

import argparse
import functools
import re
import runpy
import shlex
import sys

import pytest

import options
import train
from config import validate
from data import download
from eval import __main__ as evaluation
from eval import chat, compare, divergence, traces
from eval.study import __main__ as study
from eval.study import plan
from model.export import ExportOptions
from tests import options_table
from tests.conftest import ROOT

# What forking.md asks for exists only in its copies of the project: tests/test_forking.py runs it.
GUIDES = [page for page in (ROOT / "docs").glob("*.md") if page.stem != "forking"]
PAGES = [ROOT / "README.md", *sorted(GUIDES)]
PARSERS = {
    "eval": evaluation.parse,
    "eval.traces": traces.parse,
    "eval.chat": functools.partial(options.parse, chat.ChatOptions),
    "eval.compare": functools.partial(options.parse, compare.CompareOptions),
    "eval.divergence": functools.partial(options.parse, divergence.DivergenceOptions),
    "eval.study": functools.partial(options.parse, study.StudyOptions),
    "data.download": functools.partial(options.parse, download.DownloadOptions),
    "model.export": functools.partial(options.parse, ExportOptions),
}


def commands():
    """Every line of the pages' shell blocks, with the page as the test's name."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S):
            for line in block.splitlines():
                found.append(pytest.param(line, id=f"{page.stem}: {line}"))
    return found


class Parsed(Exception):
    """Ends a benchmark as soon as its options are parsed."""


def parse_bench(module, argv, monkeypatch):
    """Parse the options of a benchmark, which reads them with argparse, and run no more of it."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(self, args=None, namespace=None):
        parse_args(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def check_module(module, argv, monkeypatch):
    """Parse the options of `python -m MODULE`; the studies that are named are planned, too."""
    if module.startswith("bench."):
        return parse_bench(module, argv, monkeypatch)
    args = PARSERS[module](argv)
    if module == "eval.study":
        assert plan.read(args.file, args.seeds, args.arms, args.rehearse).jobs


@pytest.mark.parametrize("line", commands())
def test_every_command_exists_and_its_options_are_right(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif "train.py" in words:
        assert words[0] in ("python", "torchrun")
        argv = words[words.index("train.py") + 1 :]
        if argv != ["--help"]:
            validate(options.parse(train.Config, argv))
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], words[3:], monkeypatch)
    elif words[0] == ".":
        assert words[1] == ".venv/bin/activate"
    else:
        assert words[:2] == ["wandb", "sweep"] and (ROOT / words[2]).is_file()


def test_the_table_of_options_is_that_of_the_code():
    """Else: python -m tests.options_table > docs/options.md"""
    assert (ROOT / "docs/options.md").read_text() == options_table.table()


def test_the_commands_of_every_page_are_found():
    lines = [parameter.id for parameter in commands()]
    for page in PAGES:
        assert any(line.startswith(f"{page.stem}: ") for line in lines), page
    assert sum("python -m eval.study" in line for line in lines) >= 3
