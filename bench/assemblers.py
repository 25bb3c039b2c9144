"""The checks of a benchmark under every ptxas at hand: some versions assemble wgmma wrongly."""

import glob
import os
import shutil
import subprocess
import sys
import tempfile

from bench.measure import Bench
from bench.processes import last_json, run_limited


def version_of(ptxas: str) -> str:
    """The release that a ptxas names, such as 12.8; empty where it cannot be run."""
    try:
        told = subprocess.run([ptxas, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""
    return told.split("release ")[-1].split(",")[0].strip()


def other_assemblers() -> dict[str, str]:
    """Paths of ptxas by version, besides the version that Triton uses by itself on this GPU.

    Looked for in PATH, in /usr/local/cuda*, and in NVIDIA's wheels, installed or unpacked anywhere
    on Python's path.
    """
    import triton

    tools = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin")
    used = version_of(os.environ.get("TRITON_PTXAS_PATH") or os.path.join(tools, "ptxas"))
    paths = [shutil.which("ptxas"), *glob.glob("/usr/local/cuda*/bin/ptxas")]
    for folder in sys.path:
        paths += glob.glob(os.path.join(folder or ".", "nvidia/*/bin/ptxas"))
    found = {}
    for path in paths:
        version = version_of(path) if path else ""
        if version and version != used:
            found.setdefault(version, os.path.abspath(path))
    return found


def check_with_others(bench: Bench, module: str, limit_s: float) -> None:
    """`python -m module --only-check` under each other ptxas, a process each.

    An illegal memory access then costs one row. A wrong result under another assembler does not
    make this run wrong: it says which one not to use.
    """
    for version, path in other_assemblers().items():
        command = [sys.executable, "-m", module, "--only-check"]
        env = {"TRITON_PTXAS_PATH": path, "TRITON_CACHE_DIR": tempfile.mkdtemp()}
        outcome = run_limited(command, limit_s, env)
        record = last_json(outcome.stdout)
        right = bool(record and record["right"])
        row = {"ptxas": version, "right": right, "failed": outcome.failed, "record": record}
        bench.keep("other_assemblers", row)
        print(f"ptxas {version}: {'right' if right else 'WRONG'} {outcome.failed}", flush=True)
