"""Executions a second in the sandbox for generated code, each in processes of its own.

    python -m bench.sandbox [--data path/to/HumanEval.jsonl.gz] [--count 1000] [--workers 2]

With `--data` the gold solutions of HumanEval against their tests, over and over; without it a
problem of that size. One run of 20 first starts the helpers. The last line adds a program in four
that loops for ever, at a limit of one second, as an untrained policy writes them.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from data.sandbox import check_many, missing

PROGRAM = '''
from typing import List


def has_close_elements(numbers: List[float], threshold: float) -> bool:
    """Whether any two numbers are closer to each other than the threshold."""
    ordered = sorted(numbers)
    return any(b - a < threshold for a, b in zip(ordered, ordered[1:]))
'''
TESTS = """
from solution import has_close_elements

def check(candidate):
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.3) == True
    assert candidate([1.0, 2.0, 3.9, 4.0, 5.0, 2.2], 0.05) == False
    assert candidate([1.0, 2.0, 5.9, 4.0, 5.0], 0.95) == True
    assert candidate([1.0, 2.0, 5.9, 4.0, 5.0], 0.8) == False
    assert candidate([1.0, 2.0, 3.0, 4.0, 5.0, 2.0], 0.1) == True
    assert candidate([1.1, 2.2, 3.1, 4.1, 5.1], 1.0) == True
    assert candidate([1.1, 2.2, 3.1, 4.1, 5.1], 0.5) == False

check(has_close_elements)
"""


def jobs_of(data: str | None) -> list[tuple[str, str]]:
    """Programs with the code that checks them."""
    from data.formats import read_examples
    from data.grading.code import find_code

    if not data:
        return [(PROGRAM, TESTS)]
    jobs = []
    for example in read_examples(Path(data), "test"):
        solution = example.messages[1]["content"]
        jobs.append((find_code(solution, example.answer or "")[0], example.answer))
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="HumanEval.jsonl.gz, or a file of MBPP")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    jobs = list(itertools.islice(itertools.cycle(jobs_of(args.data)), args.count))
    print("\n".join(f"lacks: {lack}" for lack in missing()) or "every protection is available")
    check_many(jobs[:20], args.workers)
    began = time.perf_counter()
    outcomes = check_many(jobs, args.workers)
    seconds = time.perf_counter() - began
    median = statistics.median(outcome.seconds for outcome in outcomes)
    passed = sum(outcome.passed for outcome in outcomes)
    print(
        f"{args.count:,} executions, {args.workers} at a time: {seconds:.1f} s, "
        f"{args.count / seconds:.0f} a second; {passed:,} passed, median {1000 * median:.1f} ms"
    )
    mixed = jobs[:40]
    for i in range(0, len(mixed), 4):
        mixed[i] = ("while True: pass", mixed[i][1])
    loops = len(range(0, len(mixed), 4))
    began = time.perf_counter()
    check_many(mixed, args.workers, timeout=1.0)
    seconds = time.perf_counter() - began
    print(f"{len(mixed)} of which {loops} loop for ever (1 s each): {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
