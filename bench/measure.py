"""What the benchmarks share: a device or one clear line, timing, comparison, tables, the record.

`Bench` holds what one run of a benchmark found. Its JSON is written again after every row, so that
neither a crash of the GPU nor a killed process costs what was measured before.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def device_or_exit(dry: bool) -> torch.device:
    """The GPU; with `dry` the CPU. Exit code 2 and one line where there is no fitting GPU."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        needs = "an NVIDIA GPU of compute capability 8.0 or more"
        print(f"this benchmark needs {needs}; none is here", file=sys.stderr)
        sys.exit(2)
    return torch.device("cuda")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, the commit, and the name of the device."""
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "commit": commit(),
    }
    if device.type == "cuda":
        import triton

        record["device"] = torch.cuda.get_device_name()
        record["cuda"] = torch.version.cuda
        record["triton"] = triton.__version__
        record["ptxas"] = os.environ.get("TRITON_PTXAS_PATH", "bundled")
    return record


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def milliseconds(
    run: Callable[[], Any], device: torch.device, samples: int = 15, calls: int = 4
) -> float:
    """The time of a call: on a GPU the median of the samples, on a CPU one call after another.

    A sample is several calls between two CUDA events, so that the host runs ahead of the GPU.
    """
    if device.type != "cuda":
        run()
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    for _ in range(2 * calls):
        run()
    times = []
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def timed_seconds(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall seconds of one call, the GPU's work included, and what it returned."""
    began = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, result


def rounds(parts: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each part; every round calls each of them once, so that all see the same load."""
    seconds = {name: [] for name in parts}
    for _ in range(repeats):
        for name, part in parts.items():
            began = time.perf_counter()
            part()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float:
    """The median over rounds of a ratio within a round."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def resident_gb(peak: bool = False) -> float:
    """Gigabytes of memory that this process holds, or has held at most."""
    key = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1e6
    raise RuntimeError(f"/proc/self/status has no {key}")


def attempt(run: Callable[[], Any]) -> tuple[Any, str | None]:
    """(result, None), or (None, why not): what is compared with may be absent or refuse a shape."""
    try:
        return run(), None
    except Exception as e:
        first_line = (str(e).strip() or "?").splitlines()[0]
        return None, f"{type(e).__name__}: {first_line[:90]}"


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference over the norm of `want`, in fp64; NaN counts as infinite."""
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-300))
    return error if error == error else float("inf")


def all_equal(some: Iterable[torch.Tensor], others: Iterable[torch.Tensor]) -> bool:
    """Whether two lists of tensors are the same to the bit."""
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def unequal_repeats(run: Callable[[], Sequence[torch.Tensor]], times: int) -> int:
    """How many of `times` more calls give other bits than the first."""
    first = [x.clone() for x in run()]
    unequal = 0
    for _ in range(times):
        unequal += not all_equal(first, run())
    return unequal


def _shown(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[dict], columns: Sequence[str] = ()) -> str:
    """Rows as text under their names, a missing value as a dash."""
    columns = list(columns or rows[0])
    lines = [columns]
    for row in rows:
        lines.append([_shown(row.get(column)) for column in columns])
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        padded.append("  ".join(cells).rstrip())
    return "\n".join(padded)


def show(row: dict, columns: Sequence[str] = ()) -> None:
    """Print one row while the others are still being measured."""
    print(table([row], columns).splitlines()[1], flush=True)


def parser_of(doc: str, output: str, default: str, minutes: float) -> argparse.ArgumentParser:
    """The options that all benchmarks of a GPU have; `output` names the one of the JSON file."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(output, dest="path", default=default, help="everything as JSON")
    parser.add_argument("--minutes", type=float, default=minutes, help="begin nothing later")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU: the script")
    return parser


def add_check_options(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks that begin with checks of a kernel."""
    parser.add_argument("--only-check", action="store_true", help="its record is the last line")
    parser.add_argument("--one-assembler", action="store_true", help="try no other ptxas")


class Bench:
    """What one run of a benchmark measured, on one device, until a deadline.

    Attributes:
        record: what becomes the JSON file: environment, right (whether all checks passed), and a
            list of rows by the name of its section.
    """

    def __init__(self, dry: bool, minutes: float, path: str = "") -> None:
        """path: of the JSON file, written after every row; none with an empty one."""
        self.dry, self.device, self.path = dry, device_or_exit(dry), path
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.began = time.perf_counter()
        self.deadline = self.began + 60 * minutes
        self.record: dict[str, Any] = {"environment": environment(self.device), "right": True}

    def out_of_time(self) -> bool:
        return time.perf_counter() > self.deadline

    def write(self) -> None:
        if self.path:
            self.record["seconds"] = time.perf_counter() - self.began
            unfinished = f"{self.path}.part"
            Path(unfinished).write_text(json.dumps(self.record, indent=1))
            os.replace(unfinished, self.path)

    def put(self, name: str, value: Any) -> None:
        """Record a single value."""
        self.record[name] = value
        self.write()

    def keep(self, section: str, row: dict, columns: Sequence[str] = ()) -> dict:
        """Record a row, and print it if `columns` are given."""
        self.record.setdefault(section, []).append(row)
        self.write()
        if columns:
            show(row, columns)
        return row

    def check(self, section: str, row: dict) -> None:
        """Record and print a check; its "right" decides the exit code."""
        self.record["right"] &= row["right"]
        self.keep(section, row)
        print(json.dumps(row), flush=True)

    def peak_gb(self, run: Callable[[], Any]) -> float:
        """Gigabytes of GPU memory that run() allocates above what was there before."""
        if self.device.type != "cuda":
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def milliseconds(self, run: Callable[[], Any]) -> float:
        """The median of ten single calls."""
        return milliseconds(run, self.device, samples=10, calls=1)

    def measure(self, run: Callable[[], Any], **facts: Any) -> dict[str, Any]:
        """The facts with milliseconds and peak memory of run(), or why there are none."""
        if self.out_of_time():
            return facts | {"failed": "out of time"}
        figures, why = attempt(lambda: {"gb": self.peak_gb(run), "ms": self.milliseconds(run)})
        return facts | (figures or {"failed": why})

    def copy_ceiling(self) -> float:
        """Bytes per second, read and written, of a large device-to-device copy."""
        source = torch.empty(1 << (20 if self.dry else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        ms = milliseconds(lambda: target.copy_(source), self.device)
        return 2e3 * source.numel() / ms

    def only_checked(self) -> int:
        """The record as the last line, for `assemblers`; the exit code."""
        print(json.dumps(self.record), flush=True)
        return 0 if self.record["right"] else 1

    def finish(self) -> int:
        """Write the record; the exit code: 1 where a check failed."""
        self.write()
        verdict = "passed" if self.record["right"] else "FAILED"
        print(f"\n{self.path} written; checks {verdict}")
        return 0 if self.record["right"] else 1
