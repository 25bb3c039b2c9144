"""Test sets are fetched with checksums."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pyarrow
import pyarrow.parquet
import pytest

from data import download
from eval import benchmarks


@pytest.fixture
def server():
    """An HTTP server on this machine and the files it gives."""
    files = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = files.get(self.path)
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write(found or b"")

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", files
        http.shutdown()


def test_downloads_are_kept_only_with_the_right_checksum(server, tmp_path, monkeypatch, capsys):
    address, files = server
    files["/a"] = b'{"question": "1?", "answer": "#### 1"}\n'
    right = hashlib.sha256(files["/a"]).hexdigest()
    sets = {
        "good": [("good/test.jsonl", f"{address}/a", right)],
        "bad": [("bad/test.jsonl", f"{address}/a", "0" * 64)],
        "gone": [("gone/test.jsonl", f"{address}/b", right)],
    }
    monkeypatch.setattr(download, "SETS", sets)
    to = ["--to", str(tmp_path / "sets")]
    assert download.main(["good", *to]) == 0 and "fetched" in capsys.readouterr().out
    assert (tmp_path / "sets/good/test.jsonl").read_bytes() == files["/a"]
    files["/a"] = b"other"
    # not fetched again
    assert download.main(["good", *to]) == 0 and "is there" in capsys.readouterr().out
    (tmp_path / "sets/good/test.jsonl").write_bytes(b"touched")
    for name, code, words in (
        ("bad", 2, "checksum mismatch"),
        ("gone", 2, "Not Found"),
        ("good", 2, "not the set's own"),
        ("x", 2, "not among"),
    ):
        assert download.main([name, *to]) == code
        assert [path.name for path in (tmp_path / "sets").iterdir()] == ["good"]
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert download.main([]) == 2
    (kept,) = [path.name for path in (tmp_path / "sets").rglob("*") if path.is_file()]
    assert kept == "test.jsonl"  # no drafts are left


def test_checksums_are_those_of_the_real_files(real_data, tmp_path):
    checked = 0
    for files in download.SETS.values():
        for place, _, digest in files:
            if (real_data / place).is_file():
                assert download.digest_of(real_data / place, "") == digest, place
                checked += 1
    assert checked >= 9
    same = download.digest_of(real_data / "gsm8k" / "test.jsonl", "rows")
    assert download.SETS["gsm8k-parquet"][0][2] == f"rows:{same}"


def test_gsm8k_as_the_hub_keeps_it(server, real_data, tmp_path, monkeypatch, capsys):
    """Rows of the JSONL files as Parquet are accepted as the same set; with a changed word not."""
    address, files = server
    rows = [json.loads(line) for line in open(real_data / "gsm8k/test.jsonl")]

    def give(rows):
        path = tmp_path / "made.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        files["/test"] = path.read_bytes()

    (place, _, digest), _ = download.SETS["gsm8k-parquet"]
    monkeypatch.setitem(download.SETS, "gsm8k-parquet", [(place, f"{address}/test", digest)])
    argv = ["gsm8k-parquet", "--to", str(tmp_path)]
    give([rows[0] | {"question": "Another?"}, *rows[1:]])
    assert download.main(argv) == 2 and "checksum mismatch" in capsys.readouterr().err
    files["/test"] = b"no Parquet"
    assert download.main(argv) == 2 and "not a Parquet file" in capsys.readouterr().err
    give(rows)
    assert download.main(argv) == 0
    ours, theirs = (benchmarks.load("gsm8k", place).examples for place in (tmp_path, real_data))
    assert [(e.messages, e.answer) for e in ours] == [(e.messages, e.answer) for e in theirs]
