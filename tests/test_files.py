"""Files that are not what they should be: one line that says what they are, and what helps."""

import gzip
import io
import json
import os
import pickle
import zipfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file

import files
import toy_models
import train
from data.tokenizer import Tokenizer
from errors import UserError
from model.checkpoint import build_model, read_config, save_model
from tests.test_model import theirs

OID = "4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393"
LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{OID}\nsize 12345\n".encode()


def parquet():
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), out)
    return out.getvalue()


def zipped():
    out = io.BytesIO()
    torch.save({"a": torch.ones(1)}, out)
    assert zipfile.is_zipfile(out)
    return out.getvalue()


@pytest.mark.parametrize(
    "content,words",
    [
        (LFS, "git lfs pull"),
        (LFS.replace(b"\n", b"\r\n"), "git lfs pull"),
        (b"/annex/objects/SHA256E-s3--ab.json\n", "git annex get"),
        (b"../../.git/annex/objects/Xv/1Q/SHA256E-s3--ab/SHA256E-s3--ab", "git annex get"),
        (b"# xet version 0\nfilesize = 12\nhash = 'ab'\n", "xet"),
        (b"<!DOCTYPE html>\n<html><head>", "web page"),
        (b"\n  <html lang='en'>", "web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
        (b"Entry not found", "Entry not found"),
        (b"404: Not Found", "404: Not Found"),
        (b'{"error":"Invalid credentials"}', "refusal"),
        (b'{"error": {"code": 401}, "message": "no"}\n', "refusal"),
        (b'{\n  "statusCode": 404,\n  "error": "Not Found",\n  "message": "gone"\n}', "refusal"),
        (b"", "is empty"),
        (bytes(10000), "zero bytes"),
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (zipped(), "zip archive"),
        (parquet(), "Parquet"),
        (pickle.dumps({"a": 1}), "pickle"),
        ('{"a": 1}'.encode("utf-16"), "save it as UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "save it as UTF-8"),
        ('{"a": 1}'.encode("utf-32"), "save it as UTF-8"),
        ('{"a": "é"}'.encode("latin-1"), "save it as UTF-8"),
    ],
)
def test_what_is_no_text_of_ours_is_named(content, words, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as e:
        files.read_json(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_safetensors_under_another_name(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="tokenizer.json is a safetensors file"):
        files.read_text(tmp_path / "tokenizer.json")
    assert files.explain((tmp_path / "tokenizer.json").read_bytes(), "safetensors") is None


@pytest.mark.parametrize(
    "kind,content",
    [
        ("parquet", parquet()),
        ("gzip", gzip.compress(b"x", mtime=0)),
        ("text", b"[1]"),
        ("text", "ü\n".encode() * 3000),
        ("text", b'{"error": null, "question": "1+1?", "answer": "2"}\n'),
        ("text", b'{"error": "a slip of the pen", "fix": "none"}'),
        ("text", b'{"error": null}'),
        ("text", b'{"error": "x"}\n{"error": "y"}\n'),
        ("text", b'{"error": "' + b"x" * 9000 + b'"}'),
        ("text", b'{"error": '),
    ],
)
def test_what_is_as_expected_is_not_explained(kind, content):
    assert (
        files.explain(content, kind) is None and files.explain(content[: files.HEAD], kind) is None
    )


def test_links_and_folders(tmp_path):
    (tmp_path / "gone.json").symlink_to("../../blobs/0a1b")
    (tmp_path / "folder.json").mkdir()
    for name, words in (
        ("gone.json", "link to ../../blobs/0a1b"),
        ("folder.json", "is a folder"),
        ("none.json", "is not there"),
    ):
        with pytest.raises(UserError, match=words):
            files.read_json(tmp_path / name)


@pytest.mark.parametrize(
    "text,words",
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' is there twice"),
        ("[" * 100000, "nested too deeply"),
        ('{"a": ' * 100000, "nested too deeply"),
        ("[1]", "found a list"),
        ("null", "found null"),
        ("7", "found a number"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "Infinity"),
        ('{"a": ' + "1" * 5000 + "}", "digits"),
        ('{"a": 1', "line 1"),
    ],
)
def test_odd_json(text, words, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words) as e:
        files.read_json(tmp_path / "a.json", finite=True)
    assert "a.json" in str(e.value) and "\n" not in str(e.value)


def test_a_byte_order_mark_is_no_content_and_own_figures_may_be_nan(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xbc"}')
    assert files.read_json(tmp_path / "a.json") == {"a": "ü"}
    (tmp_path / "b.json").write_text('{"a": NaN}')
    assert np.isnan(files.read_json(tmp_path / "b.json")["a"])


# --- where they are read --------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):

    theirs("qwen2-tied").save_pretrained(tmp_path / "in")
    model = build_model(read_config("", tmp_path / "in"), tmp_path / "in", device="cpu", seed=0)
    (tmp_path / "ck").mkdir()
    save_model(model, tmp_path / "ck", toy_models.toy_tokenizer(), [2, 0])
    return tmp_path / "ck"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ],
)
def test_a_pointer_in_place_of_any_file_of_a_checkpoint(name, checkpoint):
    from model.load import find

    find(str(checkpoint)).model()
    (checkpoint / name).write_bytes(LFS)
    with pytest.raises(
        UserError, match=rf"{name}.* is a git-lfs pointer, not the file: run git lfs pull"
    ) as e:
        find(str(checkpoint)).model()
    assert "\n" not in str(e.value)


def test_a_tokenizer_with_byte_order_marks_is_the_same_and_is_saved_without(checkpoint, tmp_path):
    ids = Tokenizer.load(checkpoint).encode("Mia has 12 apples.")
    content = (checkpoint / "tokenizer.json").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes(b"\xef\xbb\xbf" + (checkpoint / name).read_bytes())
    marked = Tokenizer.load(checkpoint)
    assert marked.encode("Mia has 12 apples.") == ids
    marked.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == content


@pytest.mark.parametrize("mask,mode", [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_outputs_are_readable_as_the_umask_says(mask, mode, tmp_path):

    before = os.umask(mask)
    try:
        argv = [
            "--mode=sft",
            "--device=cpu",
            "--steps=1",
            "--batch_size=2",
            "--eval_examples=0",
            "--data=word_problems:4",
            "--lora_rank=2",
            f"--runs={tmp_path}",
            "--name=r",
        ]
        assert train.main(argv) == 0
    finally:
        os.umask(before)
    found = {
        p.relative_to(tmp_path).as_posix(): p.stat().st_mode & 0o777
        for p in tmp_path.rglob("*")
        if p.is_file()
    }
    saved = {name.rpartition("/")[2] for name in found}
    assert {
        "model.safetensors",
        "adapter_model.safetensors",
        "optimizer.safetensors",
        "metrics.jsonl",
        "curves.png",
    } <= saved
    assert {name: oct(m) for name, m in found.items() if m != mode} == {}


def test_write_json_reads_back(tmp_path):
    files.write_json(tmp_path / "a.json", {"ü": [1, None]})
    assert (
        json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        == {"ü": [1, None]}
        == files.read_json(tmp_path / "a.json")
    )
