"""Shared by all tests: the repository's root on the path, one thread per process, real data where it is at hand."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may reach for a network


@pytest.fixture(autouse=True)
def quiet_seed():
    torch.manual_seed(0)


@pytest.fixture
def real_data():
    """The folder with GSM8K and the Qwen2.5 tokenizer, named by SRLM_DATA."""
    folder = Path(os.environ.get("SRLM_DATA", ""))
    if not os.environ.get("SRLM_DATA") or not (folder / "gsm8k" / "train.jsonl").is_file():
        pytest.skip("SRLM_DATA names no folder with gsm8k/ and qwen2.5-tokenizer/")
    return folder
