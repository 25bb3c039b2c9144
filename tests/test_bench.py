"""The benchmarks of the attention kernels, without a GPU: one clear line; and every step of them on tiny sizes by the reference paths."""

import json

import pytest
import torch

from bench import attention, attention_sweep, decode, gpu
from kernels import backend


@pytest.fixture(autouse=True)
def by_the_device():
    yield
    backend.use("auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", [attention, attention_sweep, decode])
def test_without_a_gpu_there_is_one_line(module, capsys):
    with pytest.raises(SystemExit) as end:
        module.main([])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and len(err.splitlines()) == 1 and "GPU" in err


def test_attention_runs_through(tmp_path, capsys):
    assert attention.main(["--dry", "--json", str(tmp_path / "a.json")]) == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["right"] and {row["E"] for row in record["checks"]} == {64, 128}
    ran = {(row["shape"], row["way"]) for row in record["speeds"] if row["forward_ms"]}
    assert {("2 x 24", "srlm table"), ("2 x 24", "sdpa math"), ("GSM8K 300", "srlm table")} <= ran
    assert all(row["apart"] < 1e-5 for row in record["speeds"] if row["forward_ms"])


def test_decode_runs_through(tmp_path, capsys):
    assert decode.main(["--dry", "--json", str(tmp_path / "d.json")]) == 0
    record = json.loads((tmp_path / "d.json").read_text())
    assert record["right"] and all(row["microseconds_a_layer"] for row in record["decode"])
    assert record["engine"][0]["way"] == "srlm" and record["engine"][0]["tokens_per_s"] > 0


def test_a_wrong_result_is_noticed(tmp_path, capsys, monkeypatch):
    right = attention.PackedAttention.__call__
    monkeypatch.setattr(
        attention.PackedAttention, "__call__", lambda self, *args: right(self, *args) * 1.02
    )
    assert attention.main(["--dry", "--only-check"]) == 1
    monkeypatch.setattr(
        decode, "decode_attention", lambda *args: decode.decode_reference(*args) * 1.02
    )
    assert decode.main(["--dry", "--only-check"]) == 1
    numbers = iter(range(9))
    assert gpu.unequal_repeats(lambda: (torch.tensor(next(numbers) // 3),), 5) == 3


def test_gsm8k_lengths_fill_the_tokens_and_keep_the_mean():
    lengths = attention.gsm8k_lengths(32768)
    assert (
        sum(lengths) == 32768
        and 170 < sum(lengths) / len(lengths) < 190
        and 300 < max(lengths) <= 472
    )
