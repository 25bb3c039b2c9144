"""The size of the code and its limits: `python -m tests.gates`, a part of `make lint`.

Lines count at 100 columns, as `ruff format` lays the code out, and tokens as `tokenize` finds them
(comments and docstrings aside), so that neither can be saved by writing more densely. What later
capabilities need raises the limits; `LOG.md` says what raised them. The other gates (complexity,
number of arguments, types) are rules of ruff and pyright in `pyproject.toml`.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What a researcher reads in an evening and forks the next day.
CORE = (
    "train.py",
    "config.py",
    "losses/",
    "rl/",
    "data/batch.py",
    "data/dataset.py",
    "model/transformer.py",
    "kernels/chunk.py",
    "kernels/linear_logprob.py",
    "kernels/linear_kl.py",
)
OUTSIDE = ("tests/", "bench/")

# What the blueprint wanted for them is 2,800, 16,500 and 104,300: LOG.md says why it is missed.
LIMITS = {"core lines": 4_595, "lines": 29_250, "tokens": 185_800}

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def source_files(root: Path = ROOT) -> list[str]:
    """The project's Python files outside tests and bench, relative to `root`."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    names = sorted(set(listed.stdout.split()))
    return [n for n in names if not n.startswith(OUTSIDE) and (root / n).exists()]


def measure(text: str) -> Counter:
    """Counts of lines, tokens and constructs in a file's text."""
    tree = ast.parse(text)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, DEFINITIONS) and ast.get_docstring(node) is not None:
            first = node.body[0]
            docstrings.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    count = Counter(files=1, lines=text.count("\n"))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        count["comments"] += token.type == tokenize.COMMENT
        if token.type not in NO_CODE and token.start[0] not in docstrings:
            count["tokens"] += 1
            code.add(token.start[0])
    count["code lines"] = len(code)
    count["long lines"] = sum(len(line) > 100 for line in text.splitlines())
    for node in ast.walk(tree):
        count["comprehensions"] += isinstance(node, COMPREHENSIONS)
        count["ternaries"] += isinstance(node, ast.IfExp)
        count["lambdas"] += isinstance(node, ast.Lambda)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            count["functions"] += 1
            annotated = all(a.annotation for a in named)
            count["typed"] += annotated and (bool(named) or node.returns is not None)
    return count


def figures(root: Path = ROOT) -> dict[str, float]:
    """What is limited and what is only shown, of the whole project."""
    count = Counter()
    for name in source_files(root):
        measured = measure((root / name).read_text(encoding="utf-8"))
        count.update(measured)
        if name.startswith(CORE):
            count["core lines"] += measured["lines"]
    return {
        "core lines": count["core lines"],
        "lines": count["lines"],
        "tokens": count["tokens"],
        "tokens a line": count["tokens"] / count["code lines"],
        "lines over 100 columns, %": 100 * count["long lines"] / count["lines"],
        "comprehensions per 1,000 lines": 1000 * count["comprehensions"] / count["lines"],
        "ternaries per 1,000 lines": 1000 * count["ternaries"] / count["lines"],
        "lambdas per 1,000 lines": 1000 * count["lambdas"] / count["lines"],
        "typed functions, %": 100 * count["typed"] / count["functions"],
        "comments per 100 lines": 100 * count["comments"] / count["lines"],
    }


def main() -> int:
    """Print all figures. Returns 1 if one is over its limit."""
    over = 0
    for name, value in figures().items():
        limit = LIMITS.get(name)
        shown = f"{value:,.0f}" if limit else f"{value:.1f}"
        verdict = ""
        if limit:
            verdict = f"at most {limit:,}"
            if value > limit:
                verdict += "   OVER THE LIMIT"
                over += 1
        print(f"{name:32}{shown:>10}   {verdict}".rstrip())
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
