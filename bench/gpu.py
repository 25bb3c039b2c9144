"""What the GPU benchmarks share: timing by events, peak memory, the copy ceiling, which assembler made the code, tables and JSON."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BEGAN = time.perf_counter()


class Bench:
    """Times and measures on one device. dry: tiny shapes on a CPU, to try the script itself where no GPU is."""

    def __init__(self, dry, minutes):
        if not dry and not torch.cuda.is_available():
            sys.exit(_fail("this benchmark needs a CUDA device (--dry tries the script itself on a CPU)"))
        self.dry, self.device, self.deadline = dry, torch.device("cpu" if dry else "cuda"), BEGAN + 60 * minutes
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.records = []

    def out_of_time(self):
        return time.perf_counter() > self.deadline

    def synchronize(self):
        if not self.dry:
            torch.cuda.synchronize()

    def seconds(self, run, repeats=10, warm_up=2):
        """Median seconds of run()."""
        for _ in range(0 if self.dry else warm_up):
            run()
        times = []
        for _ in range(1 if self.dry else repeats):
            if self.dry:
                began = time.perf_counter()
                run()
                times.append(time.perf_counter() - began)
                continue
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    def peak_gb(self, run):
        """Gigabytes that run() allocates above what was there before."""
        if self.dry:
            return 0.0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e9

    def measure(self, run, **facts):
        """A record of run(): seconds, peak memory, or why there is none. Kept, and returned."""
        if self.out_of_time():
            return self.keep(facts | {"failed": "out of time"})
        try:
            gb = self.peak_gb(run)
            return self.keep(facts | {"ms": 1e3 * self.seconds(run), "gb": gb})
        except Exception as e:  # a peer that runs out of memory or does not run here is a result too
            return self.keep(facts | {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:80] if str(e) else ''}"})

    def keep(self, record):
        self.records.append(record)
        return record

    def copy_ceiling(self):
        """Bytes per second, read and written, of a large device-to-device copy."""
        source = torch.empty(1 << (20 if self.dry else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source))

    def write(self, path, **more):
        facts = {"environment": environment(self.device), "seconds": time.perf_counter() - BEGAN} | more | {"records": self.records}
        Path(path).write_text(json.dumps(facts, indent=1))
        print(f"\n{path} has everything; {facts['seconds']:.0f} s in all")


def _fail(message):
    print(message, file=sys.stderr)
    return 2


def environment(device):
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = "unknown"
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__, "python": sys.version.split()[0], "assembler": assembler(), "commit": commit}


def assembler():
    """The version of the ptxas that Triton calls."""
    path = os.environ.get("TRITON_PTXAS_PATH") or bundled()
    try:
        return subprocess.run([path, "--version"], capture_output=True, text=True).stdout.split("release ")[1].split(",")[0]
    except (OSError, IndexError):
        return "unknown"


def bundled():
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")


def other_assembler():
    """A ptxas that is not Triton's own: the one of an installed CUDA toolkit, or None."""
    for path in (shutil.which("ptxas"), "/usr/local/cuda/bin/ptxas"):
        if path and Path(path).is_file():
            return path
    return None


def again_with_the_other_assembler(module, seconds=120):
    """Run this benchmark's --check in a process of its own, its kernels assembled by another ptxas; returns (whether that went well, or None
    if it was not done; its output or why there is none)."""
    path = other_assembler()
    if path is None or os.environ.get("TRITON_PTXAS_PATH"):
        return None, "no other assembler is at hand"
    clean = os.environ | {"TRITON_PTXAS_PATH": path, "TRITON_CACHE_DIR": tempfile.mkdtemp()}
    try:
        done = subprocess.run([sys.executable, "-m", module, "--check"], env=clean, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None, f"{path}: not done after {seconds} s"
    return done.returncode == 0, f"{path}:\n{done.stdout}{done.stderr[-2000:]}".strip()


def table(rows, columns):
    """Rows of dicts as aligned text; a missing cell is a dash."""
    show = lambda v: "–" if v is None else f"{v:.3g}" if isinstance(v, float) else str(v)
    cells = [list(columns)] + [[show(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(r[i]) for r in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in cells)
