"""Reading files that a user may hand us, with one line on what is wrong.

And writing files that appear whole or not at all.
"""

import errno
import glob
import json
import os
import shutil
import socket
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from errors import UserError, system_error

Json = dict[str, Any]  # an object in a JSON file

HEAD = 4096  # bytes at a file's beginning that tell what it is
DEPTH = 200  # of lists and objects within each other: what walks through them has no room for more
LARGEST = 1e30  # number in a file, where nothing else is said

# What a file holds when it is not the file that it should be.
LFS = "is a git-lfs pointer, not the file: run git lfs pull in that folder"
XET = "is a git-xet pointer, not the file: run git xet checkout in that folder"
ANNEX = "is a git-annex pointer, not the file: run git annex get in that folder"
POINTERS = (
    (b"version https://git-lfs.github.com/spec/", LFS),
    (b"version https://hawser.github.com/spec/", LFS),
    (b"# xet version", XET),
    (b"/annex/objects/", ANNEX),
)
MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<error")
REPLIES = (
    b"Entry not found",
    b"Repository not found",
    b"Not Found",
    b"404: Not Found",
    b"404 Not Found",
    b"Invalid username or password",
    b"Access to model",
    b"Access to dataset",
    b"Access denied",
)
# The names in a server's answer in JSON, beside "error"; a row of data has others.
REPLY_NAMES = {
    "error",
    "errors",
    "message",
    "messages",
    "status",
    "statuscode",
    "code",
    "detail",
    "details",
    "path",
    "timestamp",
    "requestid",
}
MAGIC = (
    (b"\x1f\x8b", "gzip", "a gzip archive"),
    (b"PK\x03\x04", "zip", "a zip archive, as torch.save writes too"),
    (b"PAR1", "parquet", "a Parquet file"),
    (b"ARROW1", "arrow", "an Arrow file"),
    (b"\x28\xb5\x2f\xfd", "zstd", "a zstd archive"),
    (b"\xfd7zXZ\x00", "xz", "an xz archive"),
    (b"BZh", "bzip2", "a bzip2 archive"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "a 7z archive"),
    (b"GGUF", "gguf", "a GGUF file"),
    (b"\x89HDF", "hdf5", "an HDF5 file"),
    (b"\x93NUMPY", "numpy", "a NumPy file"),
    (b"SQLite format 3\x00", "sqlite", "an SQLite database"),
    (b"%PDF-", "pdf", "a PDF file"),
    (b"\x89PNG", "png", "a PNG picture"),
)
# UTF-32 first: the mark of its little-endian form begins with that of UTF-16
WIDE_MARKS = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff", b"\xff\xfe", b"\xfe\xff")


# --- what is wrong with a file ------------------------------------------------------------


def explain(content: bytes, expected: str = "text") -> str | None:
    """Say what `content`, a file or its first bytes, is where it is not what it should be.

    expected: "text", "safetensors", or a kind of `MAGIC` such as "parquet" and "gzip".
    Returns words that follow the file's name ("is a git-lfs pointer, ..."), or None if nothing was
    recognised.
    """
    if not content:
        return "is empty"
    start = content[:HEAD].lstrip(b"\xef\xbb\xbf \t\r\n")
    for begin, words in POINTERS:
        if start.startswith(begin):
            return words
    if b".git/annex/objects/" in content[:HEAD].splitlines()[0]:  # a link, checked out as text
        return ANNEX
    if start[:16].lower().startswith(MARKUP):
        return "is a web page (of an error or a login, perhaps), not the file: download it again"
    if len(content) < HEAD and (start.startswith(REPLIES) or _is_error_object(start)):
        said = start.splitlines()[0][:60].decode("utf-8", "replace")
        return f"is a server's refusal ({said}), not the file: download it again"
    if not content.strip(b"\0"):
        return "holds only zero bytes: the download or a copy was cut off; fetch it again"
    for begin, kind, words in MAGIC:
        if content.startswith(begin):
            return None if kind == expected else f"is {words}, whatever its name says"
    if content[257:262] == b"ustar":
        return "is a tar archive, whatever its name says"
    if content[0] == 0x80 and len(content) > 1 and content[1] in (2, 3, 4, 5):
        return "is a pickle, which is never read here; save it as safetensors"
    if expected != "safetensors" and _is_safetensors(content):
        return "is a safetensors file, whatever its name says"
    if expected == "text" and (content.startswith(WIDE_MARKS) or _has_wide_letters(content)):
        return "is UTF-16 or UTF-32 text; save it as UTF-8"
    return None


def _is_error_object(text: bytes) -> bool:
    """Whether a whole file is one JSON object that says what went wrong, and nothing else."""
    if not text.startswith(b"{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return bool(value.get("error")) and {name.lower() for name in value} <= REPLY_NAMES


def _is_safetensors(content: bytes) -> bool:
    length = int.from_bytes(content[:8], "little")
    return 2 <= length < 100 << 20 and content[8:10] in (b'{"', b"{}", b"{ ")


def _has_wide_letters(content: bytes) -> bool:
    """Whether nearly every second byte is zero, as in UTF-16 without a byte order mark."""
    head = content[:HEAD]
    return len(head) >= 4 and max(head[0::2].count(0), head[1::2].count(0)) > 0.45 * len(head)


def unreadable(path: Path) -> str | None:
    """Say why there is no file to be read at `path`, in words that follow its name, or None."""
    path = Path(path)
    try:
        if path.is_symlink() and not path.exists():
            return f"is a link to {os.readlink(path)}, which is not there"
        if path.is_dir():
            return "is a folder, not a file"
        if not path.exists():
            return "is not there"
        if not path.is_file():  # which may have no end, or wait for another process
            return "is a pipe, a device or a socket, not a file"
    except OSError as e:  # a name that is too long, a folder that may not be looked into
        return f"cannot be looked at ({reason(e)})"
    return None


def check_file(path: Path) -> None:
    """Raise UserError if there is no file to be read at `path`."""
    if wrong := unreadable(path):
        raise UserError(f"{path} {wrong}")


def check_is_folder(path: Path) -> None:
    """Raise UserError if something else than a folder is there, or a link that leads nowhere."""
    if not path.is_dir() and (path.is_symlink() or path.exists()):
        raise UserError(f"{path} is neither a folder nor a link to one; move it away")


def is_there(path: Path) -> bool:
    """Whether there is a file. Raises UserError if there is something else than a file."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):  # one look: it may go at any time
            return True
    except (FileNotFoundError, NotADirectoryError):
        if not path.is_symlink():
            return False
    except OSError:
        pass  # said below
    check_file(path)
    return False


def resolved(path: str | Path) -> Path:
    """The path without links; links that lead in a circle stay, for whoever opens it to say so."""
    return Path(os.path.realpath(path))


def named(path: Path) -> bool:
    """Whether there is a file, or a link that leads nowhere.

    Reading such a link says what is wrong, where passing over it would lose the file in silence.
    """
    return path.is_file() or path.is_symlink()


def reason(error: Exception) -> str:
    """An error's own words, on one line."""
    lines = str(error).splitlines()
    return getattr(error, "strerror", None) or (lines[0] if lines else type(error).__name__)


# --- reading ------------------------------------------------------------------------------


def read_head(path: Path, expected: str = "text", label: str = "") -> bytes:
    """The first bytes of a file.

    Raises UserError, which begins with `label` (empty: the path), if the file cannot be read or if
    they show that it is something other than `expected` (see `explain`).
    """
    return _read(path, expected, label, HEAD)


def read_bytes(path: Path, expected: str = "text", label: str = "") -> bytes:
    """All of a file. Raises UserError like `read_head`."""
    return _read(path, expected, label, -1)


def _read(path, expected, label, count):
    path, label = Path(path), label or str(path)
    if wrong := unreadable(path):
        raise UserError(f"{label} {wrong}")
    try:
        with open(path, "rb") as file:
            content = file.read(count)
    except OSError as e:
        raise UserError(f"{label}: {reason(e)}") from None
    if wrong := explain(content, expected):
        raise UserError(f"{label} {wrong}")
    return content


def read_text(path: Path, label: str = "") -> str:
    """A text file in UTF-8, without its byte order mark if it has one.

    Raises UserError like `read_head`, also for text in another encoding.
    """
    return decode_text(read_bytes(path, "text", label), label or str(path))


def decode_text(content: bytes, label: str) -> str:
    """`content` as UTF-8 text without a byte order mark. The UserError begins with `label`."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content[: e.start].count(b"\n") + 1
        where = f"byte 0x{content[e.start]:02x} in line {line}"
        raise UserError(f"{label} is not UTF-8 text ({where}); save it as UTF-8") from None


def read_json(path: Path, label: str = "", finite: bool = False) -> Json:
    """A file that holds one JSON object. Raises UserError like `read_text` and `parse_json`."""
    label = label or str(path)
    value = parse_json(read_text(path, label), label, finite)
    if not isinstance(value, dict):
        found = _KINDS.get(type(value), "a number")
        raise UserError(f"{label}: expected a JSON object, found {found}")
    return value


_KINDS = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}


def parse_json(text: str | bytes, label: str, finite: bool = False) -> Any:
    """The value of a JSON text.

    Raises UserError, which begins with `label`: not JSON, a name twice in one object, nested too
    deeply; with `finite` also NaN and Infinity, which are not JSON (our own files of figures may
    hold them).
    """
    constant = _no_constant if finite else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant)
        if _is_deep(value, text):
            raise RecursionError
    except RecursionError:
        raise UserError(f"{label}: not valid JSON (nested too deeply)") from None
    except ValueError as e:
        raise UserError(f"{label}: not valid JSON ({reason(e)})") from None
    return value


def _is_deep(value: Any, text: str | bytes) -> bool:
    """Whether a text's value is more than DEPTH lists and objects deep."""
    if isinstance(text, str):
        brackets = text.count("[") + text.count("{")
    else:
        brackets = text.count(b"[") + text.count(b"{")
    if brackets <= DEPTH:
        return False
    inner = [value]
    for _ in range(DEPTH + 1):
        outer, inner = inner, []
        for part in outer:
            if isinstance(part, dict):
                inner += part.values()
            elif isinstance(part, list):
                inner += part
    return bool(inner)


def _unique(pairs):
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is there twice")
    return found


def _no_constant(name):
    raise ValueError(f"{name} is not a JSON number")


def without(values: Json, names: Collection[str]) -> Json:
    """An object without what has one of these names."""
    return {name: value for name, value in values.items() if name not in names}


def without_nulls(values: Json) -> Json:
    """An object without what is null."""
    return {name: value for name, value in values.items() if value is not None}


class Fields:
    """The values of a JSON object, each asked for by its name, its kind and its bounds.

    A null counts as a value that is not set. `where` begins every UserError.
    """

    def __init__(self, values: Any, where: object) -> None:
        if not isinstance(values, dict):
            raise UserError(f"{where} is not an object")
        self.values = without_nulls(values)
        self.where = where

    def refuse(self, text: str) -> NoReturn:
        raise UserError(f"{self.where}: {text} is not supported")

    def get(
        self, name: str, kind: type, default: Any = None, least: float = 0, most: float = LARGEST
    ) -> Any:
        """The value as a `kind` of `_KIND_NAMES`, numbers and lengths not above `most`.

        Raises UserError for one that is not, or is missing and has no default.
        """
        value: Any = self.values.get(name, default)
        if value is None:
            raise UserError(f"{self.where} has no {name!r}")
        if kind in (int, float):
            is_number = type(value) in (int, float) and least <= value <= most
            fits, bounds = is_number and kind(value) == value, f" from {least:g} to {most:g}"
        else:
            fits, bounds = isinstance(value, kind), ""
            if fits and kind in (str, list):
                fits = len(value) <= most
            if fits and kind is str:  # no half of a character, which no file can hold
                fits = value.encode("utf-8", "ignore").decode() == value
        if not fits:
            raise UserError(
                f"{self.where} has {name} {value!r:.60}, which is not {_KIND_NAMES[kind]}{bounds}"
            )
        return kind(value)

    def part(self, name: str) -> "Fields":
        """The object under a name, empty where there is none."""
        return Fields(self.get(name, dict, {}), f"{self.where}: {name}")


_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


# --- writing ------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    """Write one JSON value, readable by people."""
    Path(path).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def replace_file(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all.

    Raises UserError or RunFailed (`errors.system_error`) if the system refuses.
    """
    draft = draft_of(path)
    try:
        draft.write_text(text, encoding="utf-8")
        flush(draft)
        draft.rename(path)
    except OSError as e:
        raise system_error(e, f"{path} could not be written") from None
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def made(folder: Path) -> Iterator[None]:
    """Have a folder inside `with`. If that fails, folders that were made for it go if left empty.

    Raises OSError if it cannot be made.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):  # of one that is not empty
            for path in missing:
                path.rmdir()
        raise


def check_place(folder: Path) -> None:
    """Raise OSError if a folder is not there and could not be made; nothing is made."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(there))


def check_folder(option: str, folder: str | Path) -> None:
    """Raise UserError if a folder that is wanted later cannot be made."""
    try:
        check_place(Path(folder))
    except OSError as e:
        raise UserError(f"{option} {folder} cannot be made ({reason(e)})") from None


def draft_of(path: Path) -> Path:
    """Where this process writes what becomes `path` when it is complete.

    What processes of this host left there as they died is removed.
    """
    host = this_host().replace("?", "+")  # not every file system has it in names
    start = f"{path.name}.{host}-"
    for left in path.parent.glob(f"{glob.escape(start)}*.draft"):
        try:
            os.kill(int(left.stem.removeprefix(start)), 0)
        except ProcessLookupError:
            if left.is_dir():  # of an export
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        except (OSError, ValueError, OverflowError):
            continue  # of another user, or of a host whose name only begins like this one's
    return path.with_name(f"{start}{os.getpid()}.draft")


OUTERMOST = 0xEFFFFFFC  # Linux's first namespace of process ids


def this_host() -> str:
    """The name of this host; in a container its process ids are its own, and that is said too."""
    try:
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        namespace = OUTERMOST
    return socket.gethostname() + ("" if namespace == OUTERMOST else f"?pidns-{namespace:x}")


def flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
