"""Fetch test sets: python -m data.download gsm8k math500 --to test_sets

Every file is taken from where its makers or the evaluation that made it known keep it, at a fixed
commit, and kept only if its sha256 is the one below. The checksums are of files from there; sets
without a source of that kind are not offered.
"""

from errors import UserError, as_command  # isort: skip

import dataclasses
import hashlib
import http.client
import json
import sys
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import options
from data.formats import read_rows
from digests import file_sha256
from files import check_folder, made, reason
from options import REQUIRED, option

GITHUB = "https://raw.githubusercontent.com"
GSM8K = (
    f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
    "/grade_school_math/data"
)
GSM8K_HUB = "https://huggingface.co/datasets/openai/gsm8k/resolve/main/main"
MATH500 = (
    f"{GITHUB}/rasbt/reasoning-from-scratch/f79c9cd0ae7d824aa4e9a9bc2ca4a85167f81958"
    "/ch03/01_main-chapter-code"
)
HUMANEVAL = f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data"
MBPP = f"{GITHUB}/mrigankpawagi/PropertyEval/b2be813dcff867cc350c61b8d3ea57ec088ce1ac"
SILENCE = 60.0  # seconds without a byte after which a server is given up
QWEN = f"{GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"

# name -> [(file below the folder, address, sha256 of the file or, with "rows:", of its rows)]
SETS = {
    "gsm8k": [
        (
            "gsm8k/test.jsonl",
            f"{GSM8K}/test.jsonl",
            "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
        ),
        (
            "gsm8k/train.jsonl",
            f"{GSM8K}/train.jsonl",
            "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
        ),
    ],
    # The hub may write its Parquet files anew: checked is that their rows are those of the above.
    "gsm8k-parquet": [
        (
            "gsm8k/test-00000-of-00001.parquet",
            f"{GSM8K_HUB}/test-00000-of-00001.parquet",
            "rows:5b736e25f3d1e6cdeef6b3d89e3dc71a7e3c20288f93f1bda635f6fbeb4f41b5",
        ),
        (
            "gsm8k/train-00000-of-00001.parquet",
            f"{GSM8K_HUB}/train-00000-of-00001.parquet",
            "rows:937e90ecc5698135a95d098621de3388f3b63bec4dbd8fc1b349adf8612890aa",
        ),
    ],
    "math500": [
        (
            "math500/test.json",
            f"{MATH500}/math500_test.json",
            "a9eccff7e25ecaf3952614e5b92fe081b4f0549c68ae6a387b96e131df9ddf41",
        )
    ],
    "humaneval": [
        (
            "humaneval/HumanEval.jsonl.gz",
            f"{HUMANEVAL}/HumanEval.jsonl.gz",
            "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
        )
    ],
    "mbpp": [
        (
            "mbpp/sanitized-mbpp.json",
            f"{MBPP}/sanitized-mbpp.json",
            "8ac32b2799150228e2d745aed09c870b7e4444246d4727d1004576207ef40769",
        )
    ],
}
for _name, _digest in {
    "aime24": "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
    "amc23": "43707e1ca784602d8479de24ee8ce36609dbebc46dd152b0b12a46611aa898a4",
    "minerva_math": "0e656b430d3a0a1dab6aa853f453ba3805e28e2cabe4fc72486a897cc09d8ba2",
    "olympiadbench": "bb8c1e38a16ea9eacb77530315a674d883f267fbff79183effc53681b4fcc416",
    "svamp": "d0826ff1264f3860e46fc4e71db9e31d2d188960db87090e22677f9493e67a0d",
}.items():
    SETS[_name] = [(f"{_name}/test.jsonl", f"{QWEN}/{_name}/test.jsonl", _digest)]


def digest_of(path: Path, kind: str) -> str:
    """sha256 of a file or, for the kind "rows", of its questions and answers in any container."""
    if kind != "rows":
        return file_sha256(path)
    digest = hashlib.sha256()
    for _, row in read_rows(path):
        digest.update(json.dumps([row.get("question"), row.get("answer")]).encode() + b"\n")
    return digest.hexdigest()


def fetch(name: str, folder: str | Path, say: Callable[[str], None]) -> None:
    """Fetch those of a set's files that are not there yet, and check all.

    say: gets a line for every file.

    A set that cannot be fetched leaves nothing behind. Raises UserError.
    """
    if name not in SETS:
        raise UserError(f"{name} is not among the sets that can be fetched: {', '.join(SETS)}")
    for place, url, checksum in SETS[name]:
        path = Path(folder) / place
        kind, _, expected = checksum.rpartition(":")
        if path.exists():
            found = digest_of(path, kind)
            if found != expected:
                raise UserError(
                    f"{path} is there but not the set's own file (checksum {found[:12]}, "
                    f"not {expected[:12]}); move it away"
                )
            say(f"{path} is there")
            continue
        try:
            with made(path.parent):
                _fetch(url, path, kind, expected)
        except (OSError, http.client.HTTPException) as e:
            words = getattr(e, "reason", None) or reason(e)
            raise UserError(
                f"{url} could not be fetched to {path} ({words}); fetch it by hand"
            ) from None
        say(f"{path} fetched")


def _fetch(url: str, path: Path, kind: str, expected: str) -> None:
    """Write what a server has into a file, if it has this digest."""
    draft = path.with_name("draft-" + path.name)  # keeps the suffix by which it is read
    try:
        with urllib.request.urlopen(url, timeout=SILENCE) as answer:
            draft.write_bytes(answer.read())
        found = digest_of(draft, kind)
        if found != expected:
            raise UserError(
                f"{url}: checksum mismatch ({found[:12]}, not {expected[:12]}); nothing was kept"
            )
        draft.rename(path)
    finally:
        draft.unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class DownloadOptions:
    """Every option of the command."""

    names: tuple[str, ...] = option(REQUIRED, f"of {', '.join(SETS)}", positional=True)
    to: str = option("test_sets", "the folder where they go, FOLDER/NAME/ each")


def run(args: DownloadOptions) -> None:
    """Fetch every set that is named."""
    check_folder("--to", args.to)
    for name in args.names:
        fetch(name, args.to, say=print)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("data.download", lambda: run(options.parse(DownloadOptions, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
