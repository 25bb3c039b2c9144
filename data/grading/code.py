"""Programming problems: HumanEval and MBPP rows, the code in a completion, and its verdict from the sandbox.

An answer is the text of the tests, a program that says `from solution import f`. What precedes that line is the problem's own beginning
(imports, helpers, the signature), which belongs to the solution too.
"""

import ast
import contextlib
import re
import threading
import warnings

from data.grade import Verdict
from data.sandbox import check
from errors import UserError

LONGEST = (
    20_000  # characters; no program is longer, and what compiles slowly is not compiled for long
)
TRIES = 50  # lines at the end of bare code that may be talk
TIMEOUT = 15.0  # seconds; the slowest gold solution (MBPP 123) takes 2 to 5
IMPORT = "\n\nfrom solution import "
MBPP_TRAIN, MBPP_TEST = (
    range(601, 975),
    range(11, 511),
)  # task ids (Austin et al., arXiv 2108.07732)
QUIET = threading.Lock()  # the filter of warnings is one for all threads
FENCE = re.compile(
    r"^[ \t]*```[ \t]*(?P<language>[\w+-]*)[^\n`]*\n(?P<code>.*?)(?:^[ \t]*```|\Z)",
    re.DOTALL | re.MULTILINE,
)


# --- rows ------------------------------------------------------------------------------------------------------------


def humaneval(row, origin):
    """(prompt, gold completion, tests) of a row of HumanEval."""
    _texts(row, origin, "prompt", "canonical_solution", "test", "entry_point")
    name = row["entry_point"]
    return (
        row["prompt"],
        row["canonical_solution"],
        f"{row['prompt'].rstrip()}{IMPORT}{name}\n{row['test'].rstrip()}\n\ncheck({name})\n",
    )


def mbpp(row, origin):
    """(question, gold completion, tests) of a row of MBPP, full or sanitized."""
    question = "prompt" if "prompt" in row else "text"
    _texts(row, origin, question, "code")
    tests, imports = row["test_list"], row.get("test_imports") or row.get("test_setup_code") or []
    imports = imports.splitlines() if isinstance(imports, str) else list(imports)
    if not (
        isinstance(tests, list) and tests and all(isinstance(t, str) for t in [*tests, *imports])
    ):
        raise UserError(f"{origin}: 'test_list' must be a list of texts that is not empty")
    try:
        with quietly():
            body, trees = ast.parse(row["code"]).body, [ast.parse(t) for t in tests]
    except SyntaxError as e:
        raise UserError(f"{origin}: its code or tests are no Python ({e.msg})") from None
    defined = {n.name for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    named = [n.id for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Name)]
    # a test may lean on what the gold code imports (596: sys)
    imports += [
        ast.unparse(n)
        for n in body
        if isinstance(n, ast.Import | ast.ImportFrom)
        and any((a.asname or a.name) in named for a in n.names)
    ]
    used = [name for name in named if name in defined]
    if not used:
        raise UserError(f"{origin}: its tests use nothing that its code defines")
    answer = (
        "\n".join(imports)
        + IMPORT
        + ", ".join(dict.fromkeys(used))
        + "\n"
        + "\n".join(tests)
        + "\n"
    )
    asked = f"{row[question].strip()}\nYour code should pass these tests:\n\n" + "\n".join(tests)
    return asked, f"```python\n{row['code'].strip()}\n```", answer


def split_of(row):
    """ "train" or "test" for rows that may not be trained on by their own rules, None where there is no such rule, "" for neither."""
    if row.get("canonical_solution") is not None:
        return "test"
    if row.get("test_list") is not None:
        number = row.get("task_id")
        return "train" if number in MBPP_TRAIN else "test" if number in MBPP_TEST else ""
    return None


def _texts(row, origin, *keys):
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UserError(f"{origin}: {key!r} must be a text that is not empty")


# --- completions -----------------------------------------------------------------------------------------------------


def grade_code(text, answer):
    """Whether the completion's code passes the tests `answer`. Strict: the code as it should be given, fenced or bare; lenient: or what
    compiles of a text that has something around it; parsed: it compiles."""
    found, marked = find_code(text, answer)
    if found is None:
        return Verdict(False, False, False)
    passed = check(found, answer, timeout=TIMEOUT).passed
    return Verdict(passed and marked, passed, marked)


def find_code(text, answer):
    """(the program of a completion or None, whether it was marked or is all of the text).

    Marked is a fenced block (the last that defines what is asked for, else the last); without a fence, all of the text. Either may be the
    body of the problem's function alone, or the whole of it."""
    beginning, _, rest = answer.partition(IMPORT)
    name = re.match(r"\w+", rest)[0]
    fenced = [
        m["code"]
        for m in FENCE.finditer(text)
        if m["language"].lower() in ("", "python", "python3", "py")
    ]
    asked_for = [code for code in fenced if _defines(code, name)]
    for code in (asked_for or fenced)[-1:]:
        program = _program(beginning, code, name)
        return program, program is not None
    if len(text) > LONGEST or (program := _program(beginning, text, name)):
        return (None, False) if len(text) > LONGEST else (program, True)
    return _without_talk(text, beginning, name), False


def _program(beginning, code, name):
    """The problem's beginning and the code as one program that compiles, or None."""
    if len(code) > LONGEST:
        return None
    if _defines(code, name):
        head, _, _ = beginning.rpartition(f"def {name}(")
        candidates = [head + "\n" + code]  # the imports and helpers above it
    else:
        indented = "\n".join(f"    {line}" for line in code.strip("\n").splitlines())
        candidates = (
            [f"{beginning}\n{code}", f"{beginning}\n{indented}"]
            if f"def {name}(" in beginning
            else [f"{beginning}\n{code}"]
        )
    return next((c for c in candidates if _compiles(c)), None)


def _without_talk(text, beginning, name):
    """The program of bare code with talk around it: from the definition, or as a body, to the last line with which it compiles; or None."""
    lines, whole = text.splitlines(), _defines(text, name)
    starts = (
        [i for i, line in enumerate(lines) if re.match(r"(?:from|import|def|class)\b|@", line)]
        if whole
        else [0]
    )
    lines = lines[starts[0] if starts else 0 :]
    for end in range(len(lines), max(0, len(lines) - TRIES), -1):
        code = "\n".join(lines[:end])
        if (
            code.strip()
            and (not whole or _defines(code, name))
            and (program := _program(beginning, code, name))
        ):
            return program
    return None


def _defines(code, name):
    return (
        re.search(rf"^(?:async\s+)?(?:def|class)\s+{name}\b|^{name}\s*=", code, re.MULTILINE)
        is not None
    )


def _compiles(program):
    """Whether it is Python. Nothing of it is run."""
    try:
        with quietly():
            compile(program, "<solution>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


@contextlib.contextmanager
def quietly():
    """No warnings of the escape sequences in generated code."""
    with QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
