"""Programming problems: HumanEval and MBPP rows, the code in a completion, and its verdict from the
sandbox.

An answer is the text of the tests, a program that says `from solution import f`. What precedes that
line is the problem's own beginning (imports, helpers, the signature), which belongs to the solution
too.
"""

import ast
import contextlib
import re
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

from data.grade import Verdict
from data.sandbox import check
from errors import UserError

LONGEST = 20_000  # characters of a program; what compiles slowly is not compiled for long
TRIES = 50  # lines at the end of bare code that may be talk
TIMEOUT = 15.0  # seconds; the slowest gold solution (MBPP 123) takes 2 to 5
IMPORT = "\n\nfrom solution import "
# Task ids (Austin et al., arXiv 2108.07732)
MBPP_TRAIN, MBPP_TEST = range(601, 975), range(11, 511)
FILTER_LOCK = threading.Lock()  # the filter of warnings is one for all threads
FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)",
    re.DOTALL | re.MULTILINE,
)


# --- rows -----------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """What is asked, a completion that solves it, and the program of its tests."""

    prompt: str
    completion: str
    tests: str


def humaneval(row: dict, origin: str) -> Problem:
    """Reads a row of HumanEval; `origin` names it in the UserError for a malformed one."""
    _require_texts(row, origin, "prompt", "canonical_solution", "test", "entry_point")
    prompt, name = row["prompt"], row["entry_point"]
    tests = f"{prompt.rstrip()}{IMPORT}{name}\n{row['test'].rstrip()}\n\ncheck({name})\n"
    return Problem(prompt, row["canonical_solution"], tests)


def mbpp(row: dict, origin: str) -> Problem:
    """Reads a row of MBPP, full or sanitized; `origin` names it in the UserError for a malformed
    one."""
    question = "prompt" if "prompt" in row else "text"
    _require_texts(row, origin, question, "code")
    tests, imports = row["test_list"], row.get("test_imports") or row.get("test_setup_code") or []
    imports = imports.splitlines() if isinstance(imports, str) else list(imports)
    are_texts = isinstance(tests, list) and all(isinstance(line, str) for line in tests + imports)
    if not are_texts or not tests:
        raise UserError(f"{origin}: 'test_list' must be a list of texts that is not empty")
    try:
        with quietly():
            body, trees = ast.parse(row["code"]).body, [ast.parse(test) for test in tests]
    except SyntaxError as error:
        raise UserError(f"{origin}: its code or tests are no Python ({error.msg})") from None
    names, defined = [], set()
    for tree in trees:
        names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            # A test may lean on what the gold code imports (596: sys).
            if any((alias.asname or alias.name) in names for alias in node.names):
                imports.append(ast.unparse(node))
    used = [name for name in dict.fromkeys(names) if name in defined]
    if not used:
        raise UserError(f"{origin}: its tests use nothing that its code defines")
    listed = "\n".join(tests)
    return Problem(
        f"{row[question].strip()}\nYour code should pass these tests:\n\n{listed}",
        f"```python\n{row['code'].strip()}\n```",
        "\n".join(imports) + f"{IMPORT}{', '.join(used)}\n{listed}\n",
    )


def split_of(row: dict) -> str | None:
    """Returns "train" or "test" where a data set's own rules say for which of them a row is, "" for
    neither, None where there is no such rule."""
    if row.get("canonical_solution") is not None:
        return "test"
    if row.get("test_list") is None:
        return None
    if row.get("task_id") in MBPP_TRAIN:
        return "train"
    return "test" if row.get("task_id") in MBPP_TEST else ""


def _require_texts(row: dict, origin: str, *keys: str) -> None:
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{origin}: {key!r} must be a text that is not empty")


# --- completions ----------------------------------------------------------------------------------


def grade_code(text: str, answer: str) -> Verdict:
    """Grades by whether the completion's code passes the tests `answer`.

    Strict: the code as it should be given, fenced or bare; lenient: or what compiles of a text that
    has something around it; parsed: it compiles."""
    program, marked = find_code(text, answer)
    if program is None:
        return Verdict(False, False, False)
    passed = check(program, answer, timeout=TIMEOUT).passed
    return Verdict(passed and marked, passed, marked)


def find_code(text: str, answer: str) -> tuple[str | None, bool]:
    """Returns the program of a completion, or None, and whether it was marked or is all of the
    text.

    Marked is a fenced block (the last that defines what is asked for, else the last); without a
    fence, all of the text. Either may be the body of the problem's function alone, or the complete
    function."""
    beginning, _, rest = answer.partition(IMPORT)
    name = re.split(r"\W", rest, maxsplit=1)[0]
    languages = ("", "python", "python3", "py")
    matches = FENCE.finditer(text)
    fenced = [match["code"] for match in matches if match["language"].lower() in languages]
    if fenced:
        asked_for = [code for code in fenced if _defines(code, name)] or fenced
        program = _program(beginning, asked_for[-1], name)
        return program, program is not None
    if len(text) > LONGEST:
        return None, False
    program = _program(beginning, text, name)
    if program is not None:
        return program, True
    return _without_talk(beginning, text, name), False


def _program(beginning: str, code: str, name: str) -> str | None:
    """The problem's beginning and the code as one program that compiles, or None."""
    if len(code) > LONGEST:
        return None
    imports_and_helpers, signature, _ = beginning.rpartition(f"def {name}(")
    if _defines(code, name):
        candidates = [f"{imports_and_helpers}\n{code}"]
    else:
        candidates = [f"{beginning}\n{code}"]
        if signature:
            indented = [f"    {line}" for line in code.strip("\n").splitlines()]
            candidates.append("\n".join([beginning, *indented]))
    for candidate in candidates:
        if _compiles(candidate):
            return candidate
    return None


def _without_talk(beginning: str, text: str, name: str) -> str | None:
    """The program of bare code with talk around it: from the definition, or as a body, to the last
    line with which it compiles; or None."""
    lines, is_complete = text.splitlines(), _defines(text, name)
    if is_complete:
        begins = re.compile(r"(?:from|import|def|class)\b|@").match
        lines = lines[next((i for i, line in enumerate(lines) if begins(line)), 0) :]
    for end in range(len(lines), max(0, len(lines) - TRIES), -1):
        code = "\n".join(lines[:end])
        if not code.strip() or (is_complete and not _defines(code, name)):
            continue
        program = _program(beginning, code, name)
        if program is not None:
            return program
    return None


def _defines(code: str, name: str) -> bool:
    definition = rf"^(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*="
    return re.search(definition, code, re.MULTILINE) is not None


def _compiles(program: str) -> bool:
    """Whether it is Python. Nothing of it is run."""
    try:
        with quietly():
            compile(program, "<solution>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No warnings of the escape sequences in generated code."""
    with FILTER_LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
