"""The evaluation's estimates against brute force and simulation; its picture of them; test sets fetched with checksums."""

import hashlib
import itertools
import json
import math
import threading
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from data import download
from eval.stats import intervals, majority_at_k, paired, pass_at_k, sign_flip_p, student_t
from eval.summary import Summary, compare, summarise
from eval.tables import aligned, markdown, table

# --- estimates -------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 8):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * correct + [0] * (n - correct), k))
            assert pass_at_k(n, correct, k) == pytest.approx(
                sum(map(any, subsets)) / len(subsets), abs=1e-12
            )


def test_pass_at_k_is_unbiased_where_the_plain_one_is_not():
    p, n, k = 0.3, 6, 4
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(chance)) == pytest.approx(
        1 - (1 - p) ** k, abs=1e-12
    )
    assert (
        abs(sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(chance)) - (1 - (1 - p) ** k))
        > 0.03
    )


def test_majority():
    vote = lambda votes, k, gold="a": majority_at_k(votes, [v == gold for v in votes], k)
    assert vote(["a", "b", "a"], 3) == 1 and vote(["a", "b", "b"], 3) == 0
    assert (
        vote(["a", "b"], 2) == 0.5 and vote(["a", "b", "c", "c", "a"], 5) == 0.5
    )  # equally common: each as often
    assert vote([None, None, "a"], 3) == 1 and vote([None] * 3, 3) == 0
    assert vote(["a", "a", "b", "b", "a"], 2) == 0.5  # runs aa, bb; the fifth has no partner
    assert vote(["a", "b", "a"], 1) == pytest.approx(2 / 3)
    rng = np.random.default_rng(0)
    for _ in range(200):  # against all ways to choose among the commonest
        votes = [rng.choice(["a", "b", "c", None]) for _ in range(5)]
        voted = [v for v in votes if v is not None]
        best = {v for v in voted if voted.count(v) == max(voted.count(w) for w in voted)}
        assert vote(votes, 5) == (("a" in best) / len(best) if best else 0)


def test_sign_flips_against_all_assignments_and_mcnemar():
    rng = np.random.default_rng(1)
    for size in [*range(1, 11)] * 6:
        d = rng.integers(-4, 5, size)
        sums = [
            abs(sum(s * x for s, x in zip(signs, d)))
            for signs in itertools.product((1, -1), repeat=size)
        ]
        assert sign_flip_p(d) == pytest.approx(
            np.mean([s >= abs(d.sum()) for s in sums]), abs=1e-12
        )
    assert sign_flip_p([]) == sign_flip_p([0, 0]) == 1
    for better, worse in ((10, 2), (40, 20), (700, 619)):  # McNemar's exact test, in whole numbers
        n = better + worse
        tail = sum(Fraction(math.comb(n, j), 2**n) for j in range(better, n + 1))
        assert sign_flip_p([1] * better + [-1] * worse + [0] * 50) == pytest.approx(
            float(min(1, 2 * tail)), rel=1e-9
        )


def test_students_t():
    for freedom, t in (
        (5, 2.5706),
        (10, 2.2281),
        (29, 2.0452),
        (39, 2.0227),
        (100, 1.9840),
        (1318, 1.9618),
    ):  # tabulated
        assert student_t(0.975, freedom) == pytest.approx(t, abs=3e-3)


# --- intervals by simulation -------------------------------------------------------------------------------------------


def benchmarks(problems, samples, mean, spread=2.0, count=1000, seed=0):
    """[P, count] mean accuracies of `count` simulated benchmarks: problems of Beta-distributed difficulty, `samples` of each."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(mean * spread, (1 - mean) * spread, size=(problems, count))
    return rng.binomial(samples, chance) / samples


REGIMES = [(200, 1, 0.5), (200, 4, 0.3), (500, 1, 0.15), (40, 8, 0.5), (1319, 1, 0.54)]


@pytest.mark.parametrize("problems,samples,mean", REGIMES)
def test_the_95_percent_interval_covers_the_truth_in_95_percent_of_1000_benchmarks(
    problems, samples, mean
):
    low, high = intervals(benchmarks(problems, samples, mean))
    assert 0.93 <= ((low <= mean) & (mean <= high)).mean() <= 0.97


def test_samples_taken_for_problems_would_not_cover():
    """The test above can fail: the samples of a problem are alike, and counting each for itself makes intervals too narrow."""
    rng = np.random.default_rng(0)
    chance = rng.beta(1.0, 1.0, size=(100, 300))
    flat = np.concatenate([rng.binomial(1, chance) for _ in range(8)])
    low, high = intervals(flat)
    assert ((low <= 0.5) & (0.5 <= high)).mean() < 0.8


def test_the_interval_of_a_difference_and_its_p_value():
    """Two models of equal accuracy on the same problems: the interval holds 0 in 95 %, p is below 0.05 in at most 5 %; a gain is seen."""
    rng = np.random.default_rng(3)
    chance = rng.beta(1, 1, (150, 1000))
    a, b, better = (rng.binomial(4, np.minimum(1, chance + gain)) for gain in (0, 0, 0.1))
    low, high = intervals((b - a) / 4, lowest=-1.0)
    assert 0.93 <= ((low <= 0) & (0 <= high)).mean() <= 0.97
    assert np.mean([sign_flip_p(d) < 0.05 for d in (b - a).T]) <= 0.065
    assert np.mean([sign_flip_p(d) < 0.05 for d in (better - a).T]) > 0.9
    one = paired([(4, c) for c in a[:, 0]], [(4, c) for c in better[:, 0]])
    assert one["difference"] == pytest.approx((better - a)[:, 0].mean() / 4) and one[
        "p"
    ] == sign_flip_p((better - a)[:, 0])
    assert (
        one["low"] < one["difference"] < one["high"]
        and one["better"] == ((better - a)[:, 0] > 0).sum()
    )


def test_the_edges():
    low, high = intervals([[0.0, 1.0]] * 20)
    assert (
        (low[0], high[1]) == (0, 1)
        and high[0] == pytest.approx(1 - 0.025 ** (1 / 20))
        and low[1] == pytest.approx(0.025 ** (1 / 20))
    )
    assert (1 - high[0]) ** 20 == pytest.approx(
        0.025
    )  # a chance that gives 20 wrong ones in one case of 40
    assert np.isnan(intervals([[1.0]])).all()
    found = paired([(1, 1), (2, 1)], [(4, 1), (1, 1)])  # samples may differ in number
    assert (
        found["difference"] == pytest.approx((-0.75 + 0.5) / 2)
        and found["p"] == 1.0
        and (found["better"], found["worse"]) == (1, 1)
    )


def test_a_summary_by_hand():
    row = lambda problem, sample, vote, right, **more: (
        dict(
            problem=problem,
            sample=sample,
            question=f"q{problem}",
            vote=vote,
            strict=right,
            lenient=True,
            parsed=vote is not None,
            math_verify=right,
            stopped=sample == 0,
            tokens=10 * sample + 2,
        )
        | more
    )
    rows = {
        (r["problem"], r["sample"]): r
        for r in (
            row(0, 0, "7", True),
            row(0, 1, "8", False),
            row(1, 0, None, False),
            row(1, 1, "1", False),
        )
    }
    found = summarise(rows, [1, 2], {"tokens": 48, "seconds": 2.0})
    assert (found.problems, found.samples) == (2, 2)
    means = {name: interval.mean for name, interval in found.rates.items()}
    assert means == {"accuracy": 0.25, "pass@2": 0.5, "majority@2": 0.25}
    assert (found.lenient, found.math_verify) == (1.0, 0.25)
    assert (found.unparsed, found.truncated) == (0.25, 0.5)
    assert (found.tokens, found.tokens_longest, found.tokens_per_second) == (7, 12, 24)
    assert list(found.flat())[:5] == ["problems", "samples", *means]
    code = summarise(
        {k: r | {"vote": False, "math_verify": None} for k, r in rows.items()},
        [2],
        {"tokens": 0, "seconds": 0},
    )
    assert "majority@2" not in code.rates
    assert code.math_verify is None and code.tokens_per_second is None
    shown = table([Summary("a|b", "t", found), Summary("c", "code", code)])
    assert (
        markdown(shown).count("\n") == 3
        and "a\\|b" in markdown(shown)
        and "25.0 [" in aligned(shown)
    )
    others = {
        k: r | {"strict": True, "question": r["question"] if k[0] else "another"}
        for k, r in rows.items()
    }
    assert (
        compare(rows, others)["difference"] == -1 and compare(rows, others)["problems"] == 1
    )  # only what both were asked


# --- downloads ---------------------------------------------------------------------------------------------------------


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
    assert (
        download.main(["good", *to]) == 0 and "is there" in capsys.readouterr().out
    )  # not fetched again
    (tmp_path / "sets/good/test.jsonl").write_bytes(b"touched")
    for name, code, words in (
        ("bad", 2, "checksum mismatch"),
        ("gone", 1, "Not Found"),
        ("good", 2, "not the set's own"),
        ("x", 2, "not among"),
    ):
        assert download.main([name, *to]) == code
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert download.main([]) == 2
    assert sorted(p.name for p in (tmp_path / "sets").rglob("*") if p.is_file()) == [
        "test.jsonl"
    ]  # no drafts are left


def test_checksums_are_those_of_the_real_files(real_data, tmp_path):
    checked = [
        (real_data / place, digest)
        for files in download.SETS.values()
        for place, _, digest in files
        if (real_data / place).is_file()
    ]
    assert len(checked) >= 9
    for path, digest in checked:
        assert download.digest_of(path, "") == digest, path
    same = download.digest_of(real_data / "gsm8k" / "test.jsonl", "rows")
    assert download.SETS["gsm8k-parquet"][0][2] == f"rows:{same}"


def test_gsm8k_as_the_hub_keeps_it(server, real_data, tmp_path, monkeypatch, capsys):
    """Rows of the JSONL files as Parquet: accepted as the same set, read as the same examples; one changed word is not."""
    from eval import benchmarks as sets

    address, files = server
    rows = [json.loads(line) for line in open(real_data / "gsm8k/test.jsonl")]

    def give(rows):
        path = tmp_path / "made.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        files["/test"] = path.read_bytes()

    (place, _, digest), _ = download.SETS["gsm8k-parquet"]
    monkeypatch.setitem(download.SETS, "gsm8k-parquet", [(place, f"{address}/test", digest)])
    give([rows[0] | {"question": "Another?"}, *rows[1:]])
    assert (
        download.main(["gsm8k-parquet", "--to", str(tmp_path)]) == 2
        and "checksum mismatch" in capsys.readouterr().err
    )
    files["/test"] = b"no Parquet"
    assert (
        download.main(["gsm8k-parquet", "--to", str(tmp_path)]) == 2
        and "not a Parquet file" in capsys.readouterr().err
    )
    give(rows)
    assert download.main(["gsm8k-parquet", "--to", str(tmp_path)]) == 0
    strip = lambda benchmark: [(e.messages, e.answer) for e in benchmark.examples]
    assert strip(sets.load("gsm8k", tmp_path)) == strip(sets.load("gsm8k", real_data))
