"""What files were when they were written, so that no damage to them goes unseen.

`SHA256SUMS` in a folder has the form of the command of that name: `sha256sum -c SHA256SUMS` checks
it, too. A file of JSON that is replaced now and then has the digest of its values in itself.
"""

import hashlib
import itertools
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from errors import UserError
from files import Json, check_file, read_json, read_text, unreadable, without
from progress import Progress

SUMS = "SHA256SUMS"
BLOCK = 1 << 20  # bytes that are read at once
LINE = re.compile(r"([0-9a-f]{64})  ([^/\0]+)")
OWN = "sha256"  # the name of a JSON object's digest in itself
CHANGED = (
    f"take another copy or checkpoint, or delete {SUMS} there if the files were changed on purpose"
)


def sha256(content: str | bytes) -> str:
    """The SHA-256 of bytes, or of a text in UTF-8."""
    if isinstance(content, str):
        content = content.encode()
    return hashlib.sha256(content).hexdigest()


def file_sha256(path: Path, progress: Progress | None = None) -> str:
    """The SHA-256 of a file. Raises UserError if there is none."""
    check_file(path)
    digest, block = hashlib.sha256(), bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
            if progress:
                progress.add(count / 1e6)
    return digest.hexdigest()


def all_sha256(paths: list[Path]) -> dict[Path, str]:
    """The SHA-256 of each file; they are read side by side."""
    total = sum(path.stat().st_size for path in paths) / 1e6
    where = paths[0].parent if paths else ""
    progress = Progress(f"digests of {where}", total, "MB")
    with ThreadPoolExecutor() as pool:
        found = pool.map(file_sha256, paths, itertools.repeat(progress))
        return dict(zip(paths, found, strict=True))


def seal(folder: Path) -> None:
    """Write `SHA256SUMS` of its own files into a folder, and likewise into the folders in it."""
    inside = sorted(path for path in folder.iterdir() if path.name != SUMS)
    found = all_sha256([path for path in inside if path.is_file()])
    lines = [f"{digest}  {path.name}\n" for path, digest in found.items()]
    if lines:
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    for path in inside:
        if path.is_dir():
            seal(path)


def verify(folder: Path) -> dict[Path, str]:
    """The SHA-256 of each file that was sealed in this folder; folders in it are not looked at.

    Empty for a folder without `SHA256SUMS`, of which nothing is known. Raises UserError for a file
    that is missing or not what it was.
    """
    sums = folder / SUMS
    if not sums.exists():
        return {}
    wanted = {}
    for line in read_text(sums).removesuffix("\n").split("\n"):
        entry = LINE.fullmatch(line)
        if not entry:
            raise UserError(f"{sums} is damaged: {line!r:.40} is no digest and name; {CHANGED}")
        wanted[folder / entry[2]] = entry[1]
    for path in wanted:
        if wrong := unreadable(path):
            raise UserError(f"{path} {wrong}, though {SUMS} names it; {CHANGED}")
    found = all_sha256(list(wanted))
    for path, digest in found.items():
        if digest != wanted[path]:
            raise UserError(f"{path} is damaged: its SHA-256 is not the one in {SUMS}; {CHANGED}")
    return found


def _own_sha256(values: Json) -> str:
    return sha256(json.dumps(without(values, {OWN}), sort_keys=True))


def with_sha256(values: Json) -> Json:
    """An object for a JSON file, with its digest in it."""
    as_read = json.loads(json.dumps(values))  # names that are numbers become texts
    return as_read | {OWN: _own_sha256(as_read)}


def read_checked(path: Path, fix: str) -> Json:
    """The object in a JSON file, without its digest, which is checked where there is one.

    Raises UserError, which ends with `fix`.
    """
    values = read_json(path)
    if values.pop(OWN, None) not in (None, _own_sha256(values)):
        raise UserError(f"{path} is damaged: its values are not those of its digest; {fix}")
    return values
