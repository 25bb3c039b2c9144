"""Shared by all tests: the root on the path, one thread a process, real data where it is."""

import importlib
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network
os.environ["no_proxy"] = "*"  # and servers are this machine's
os.environ |= {"WANDB__SERVICE_WAIT": "300", "WANDB_INIT_TIMEOUT": "300"}

# Under nohup, or in the background of a script, some are ignored; runs that the tests start would
# ignore them, too.
for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = os.environ.get("SRLM_SEED") or str(time.time_ns() % 10**6)


def moments(name: str) -> random.Random:
    """The random moments of a campaign: new ones each time, unless SRLM_SEED says which."""
    print(f"SRLM_SEED={SEED}")
    return random.Random(f"{SEED} {name}")


def wait_until(condition: Callable[[], object], seconds: float = 300.0) -> None:
    """Wait for an event. Its limit is there to end a hang alone, whatever the machine's load."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def pytest_sessionstart() -> None:
    """Let matplotlib look for its fonts: a slow machine's first import says that it does so."""
    importlib.import_module("matplotlib.font_manager")


@pytest.fixture(autouse=True)
def quiet_seed():
    torch.manual_seed(0)


@pytest.fixture
def real_data():
    """The folder with GSM8K and the Qwen2.5 tokenizer, named by SRLM_DATA."""
    if not os.environ.get("SRLM_DATA"):
        pytest.skip("SRLM_DATA is not set: it names the folder with the real data")
    folder = Path(os.environ["SRLM_DATA"]).resolve()
    for needed in ("gsm8k/train.jsonl", "qwen2.5-tokenizer/tokenizer.json"):
        if not (folder / needed).is_file():
            pytest.skip(f"SRLM_DATA has no {needed}")
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures are empty files: drawing takes most of a small run. Other tests look at them."""
    import eval.__main__
    import train

    monkeypatch.setattr(train, "draw_curves", lambda run: (Path(run) / "curves.png").touch())
    monkeypatch.setattr(eval.__main__, "draw", lambda summaries, path: path.touch())


# Files with the longest tests: they come first, so that no worker ends with one of them alone.
LONG = ["tests/test_triton.py", "tests/test_study.py", "tests/test_train.py"]
LONG += ["tests/test_signals.py", "tests/test_forking.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return LONG.index(file) if file in LONG else len(LONG)

    items.sort(key=place)
