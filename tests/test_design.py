"""The rules of the layout: who may import whom. Sizes are limited by `tests/gates.py`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import gates
from tests.conftest import ROOT

FILES = gates.source_files()
PROJECT = {Path(name).parts[0].removesuffix(".py") for name in FILES} | {"tests", "bench"}

# What a folder may import of the project, beside itself and what may be imported anywhere.
MAY = {
    "kernels": {"kernels"},
    "losses": {"losses", "kernels", "data.batch"},
    "model": {"model", "kernels", "locks", "data.tokenizer", "run"},
    "data": {"data", "model.parallel", "model.lineage", "locks"},
    "rl": {"rl", "data", "model", "kernels", "losses"},
}
ANYWHERE = {"errors", "files", "digests", "limits", "plugins", "progress", "signals"}
# Commands in these folders read their options as every command does.
COMMANDS = {"data/download.py", "model/export.py"}
# Models are built from their folders' tokenizers and run folders here and nowhere else in model/.
LOADING = "model/load.py"


def imports(name: str) -> Iterator[str]:
    """The project's modules that a file imports, as dotted names, also inside functions."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (module for module in modules if module.split(".")[0] in PROJECT)


def within(module: str, allowed: set[str]) -> bool:
    return any(module == a or module.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("name", FILES)
def test_imports_follow_the_layout(name):
    folder = Path(name).parts[0]
    for module in imports(name):
        assert module.split(".")[0] not in ("train", "tests", "bench"), "nothing imports these"
        if folder != "eval":
            assert not module.startswith("eval."), "training does not import evaluation"
        elif not name.startswith("eval/study/"):
            assert not module.startswith("eval.study"), "only the study imports the study"
        if folder in MAY:
            allowed = MAY[folder] | ANYWHERE
            if name in COMMANDS:
                allowed |= {"options"}
            assert within(module, allowed), f"{folder} may not import {module}"
        if folder == "model" and name != LOADING:
            assert not within(module, {"run", "data"}), f"only {LOADING} may import {module}"


def test_modules_import_each_other_in_one_direction():
    """No cycle of imports, those inside functions aside."""
    names = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES
    }
    edges = {}
    for module, name in names.items():
        edges[module] = set()
        for node in ast.parse((ROOT / name).read_text()).body:
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            edges[module].update(m for m in found if m in names and m != module)
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in finished:
            for other in sorted(edges[module]):
                visit(other, (*path, module))
            finished.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_the_gates_notice_what_is_too_much(monkeypatch, capsys):
    monkeypatch.setitem(gates.LIMITS, "tokens", 10)
    assert gates.main() == 1
    assert "OVER THE LIMIT" in capsys.readouterr().out


def test_tokens_are_counted_without_comments_and_docstrings():
    text = '"""A module."""\n\n# a comment\nx = [y for y in z]  # another\n'
    count = gates.measure(text)
    assert count["tokens"] == 9 and count["comments"] == 2 and count["comprehensions"] == 1
