"""What the benchmarks of the kernels share: a device or one clear line, timing, repeats, assemblers, and the record of a run."""

import contextlib
import glob
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import torch


def device_or_exit(dry):
    """The GPU; with `dry` the CPU, where the scripts run on tiny sizes by the reference paths. Exit code 2 where there is none."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        print(
            "this benchmark needs an NVIDIA GPU of compute capability 8.0 or more; none is here",
            file=sys.stderr,
        )
        sys.exit(2)
    return torch.device("cuda")


def environment(device):
    record = dict(
        torch=torch.__version__, python=platform.python_version(), device="cpu", commit=commit()
    )
    if device.type == "cuda":
        import triton

        record |= dict(
            device=torch.cuda.get_device_name(), cuda=torch.version.cuda, triton=triton.__version__
        )
        record |= dict(ptxas=os.environ.get("TRITON_PTXAS_PATH", "bundled"))
    return record


def commit():
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
    except OSError:
        return ""


def milliseconds(f, device, samples=15, calls=4):
    """Median over samples of the time of a call; several calls to a sample, so that the host runs ahead of the GPU."""
    for _ in range(2 * calls if device.type == "cuda" else 1):
        f()
    if device.type != "cuda":
        began = time.perf_counter()
        f()
        return (time.perf_counter() - began) * 1e3
    times = []
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            f()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def attempt(f):
    """(result, None), or (None, why not in a few words): what is compared with may be absent or refuse a shape."""
    try:
        return f(), None
    except Exception as e:
        return None, f"{type(e).__name__}: {(str(e).strip() or '?').splitlines()[0][:90]}"


def relative_error(got, want):
    """‖got − want‖ / ‖want‖ in fp64; NaN counts as infinite."""
    error = ((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def unequal_repeats(f, times):
    """How many of `times` more calls give other bits than the first."""
    first = [x.clone() for x in f()]
    return sum(
        not all(torch.equal(a, b) for a, b in zip(first, f(), strict=True)) for _ in range(times)
    )


def other_assemblers():
    """ptxas programs besides the one that Triton uses by itself on this GPU: path by version."""
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
    version = lambda path: (
        subprocess.run([path, "--version"], capture_output=True, text=True)
        .stdout.split("release ")[-1]
        .split(",")[0]
        .strip()
    )
    used = os.environ.get("TRITON_PTXAS_PATH") or os.path.join(tools, "ptxas")
    paths = [shutil.which("ptxas"), *glob.glob("/usr/local/cuda*/bin/ptxas")]
    paths += glob.glob(os.path.join(sys.prefix, "lib/python*/site-packages/nvidia/*/bin/ptxas"))
    found = {}
    for path in filter(None, paths):
        with contextlib.suppress(OSError):
            if os.path.exists(path) and version(path) != version(used):
                found.setdefault(version(path), path)
    return found


def checked_with_other_assemblers(module, limit_s=150):
    """`python -m module --only-check` once for each: {version: its record, or why there is none}."""
    records = {}
    for version, path in other_assemblers().items():
        command = [sys.executable, "-m", module, "--only-check"]
        try:
            done = subprocess.run(
                command,
                env=os.environ
                | {"TRITON_PTXAS_PATH": path, "TRITON_CACHE_DIR": tempfile.mkdtemp()},
                capture_output=True,
                text=True,
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            records[version] = dict(failed=f"not done in {limit_s} s")
            continue
        lines = done.stdout.strip().splitlines()
        good = lines and lines[-1].startswith("{")
        records[version] = (
            json.loads(lines[-1])
            if good
            else dict(failed=(done.stderr.strip() or "no output").splitlines()[-1][:200])
        )
    return records


def checked(device, rows):
    """The record of a benchmark that begins with its checks, which are printed."""
    for row in rows:
        print(json.dumps(row), flush=True)
    return dict(
        environment=environment(device), checks=rows, right=all(row["right"] for row in rows)
    )


def tell_assemblers(records):
    for version, record in records.items():
        print(
            f"ptxas {version}: {record.get('failed') or ('right' if record['right'] else 'WRONG')}",
            flush=True,
        )
    return records


def table(rows, columns=None):
    """Rows of dicts as text, a missing value as a dash."""
    columns = list(columns or rows[0])
    show = lambda v: "–" if v is None else f"{v:.4g}" if isinstance(v, float) else str(v)
    cells = [columns] + [[show(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths)).rstrip() for line in cells)


@contextlib.contextmanager
def kept(record, path):
    """Whatever happens inside, an illegal memory access on the GPU too, what the record has by then is written."""
    try:
        yield
    except BaseException as e:
        record["ended"] = f"{type(e).__name__}: {str(e)[:300]}"
        raise
    finally:
        with open(path, "w") as f:
            json.dump(record, f, indent=1)


BEGAN = time.perf_counter()


def late(minutes):
    """Whether this process has run for so long."""
    return time.perf_counter() - BEGAN > 60 * minutes


def finish(record, path):
    """Write the record; the exit code: 1 where a check failed."""
    with open(path, "w") as f:
        json.dump(record, f, indent=1)
    print(f"\n{path} written; checks {'passed' if record['right'] else 'FAILED'}")
    return 0 if record["right"] else 1


class Bench:
    """Records of what was measured on one device, until a deadline."""

    def __init__(self, dry, minutes):
        self.dry, self.device = dry, device_or_exit(dry)
        self.dtype = torch.float32 if dry else torch.bfloat16
        self.began, self.minutes, self.records = time.perf_counter(), minutes, []

    def out_of_time(self):
        return time.perf_counter() > self.began + 60 * self.minutes

    def milliseconds(self, run):
        return milliseconds(run, self.device, samples=10, calls=1)

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
        """A record of run(): milliseconds and peak memory, or why there is none. Kept, and returned."""
        if self.out_of_time():
            return self.keep(facts | {"failed": "out of time"})
        figures, why = attempt(lambda: {"gb": self.peak_gb(run), "ms": self.milliseconds(run)})
        return self.keep(facts | (figures or {"failed": why}))

    def keep(self, record):
        self.records.append(record)
        return record

    def copy_ceiling(self):
        """Bytes per second, read and written, of a large device-to-device copy."""
        source = torch.empty(1 << (20 if self.dry else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e3 * source.numel() / self.milliseconds(lambda: target.copy_(source))

    @property
    def record(self):
        return {"environment": environment(self.device), "records": self.records}

    def finish(self, path, **more):
        record = {"seconds": time.perf_counter() - self.began} | more | self.record
        return finish({"right": True} | record, path)
