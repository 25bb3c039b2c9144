"""What an evaluation leaves behind: every sample as a line of JSON, its conditions, and figures.

`<out>/<checkpoint>/<task>.json` states prompt, template, test set and sampling, with hashes.
`<task>.part-<rank>.jsonl` gets a line for every finished sample, so that a killed evaluation can go
on. `<task>.jsonl` holds all of them in order, graded, at the end. Lines and files have digests in
them: what is damaged is made again or refused.
"""

import contextlib
import dataclasses
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from digests import read_checked, with_sha256
from errors import UserError
from eval.stats import Paired, intervals, majority_at_k, paired, pass_at_k
from files import Fields, Json, is_there, made, reason, replace_file, without
from locks import waiting_for

Key = tuple[int, int]  # (problem, sample)
Row = Json
Rows = dict[Key, Row]
# The end of a line: the checksum of all before it.
CHECKSUM = re.compile(r', "crc32": "([0-9a-f]{8})"\}$')


class Samples:
    """The samples of one checkpoint on one task, in files.

    path: all of them. about: under which conditions they were made, and what that took.
    """

    def __init__(self, folder: Path, task: str):
        self.folder, self.task = folder, task
        self.path, self.about = folder / f"{task}.jsonl", folder / f"{task}.json"
        self.stated = {}  # what `about` holds, from `begin` on

    def part(self, rank: int) -> Path:
        """The file to which a rank appends its finished samples."""
        return self.folder / f"{self.task}.part-{rank}.jsonl"

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.task}.part-*.jsonl"))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Have them alone inside `with`, after whoever has them now.

        What fails there before there is a sample leaves nothing.
        """
        lock, other = self.folder / f".{self.task}.lock", f"another evaluation of {self.path}"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(made(self.folder))
            except OSError as e:
                raise UserError(f"--out: {self.folder} cannot be made ({e.strerror})") from None
            stack.enter_context(waiting_for(lock, other))
            try:
                yield
            except BaseException:
                if not self.path.exists() and not self.read(again=True):
                    for file in (*self.parts(), self.about):
                        file.unlink(missing_ok=True)
                raise

    def read(self, again: bool = False) -> Rows:
        """All rows that were kept so far, without a line that a kill cut off.

        again: leave out damaged lines, too: they are to be made again. Else they are a UserError.
        """
        rows = {}
        for file in [*self.parts(), self.path]:
            if not is_there(file):
                continue
            for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
                row = _row(line)
                if row:
                    rows[row["problem"], row["sample"]] = row
                elif line and file == self.path and not again:
                    raise UserError(
                        f"{file}:{number} is damaged; the command that made it makes it again"
                    )
        return rows

    def check(self, identity: dict) -> None:
        """Raise UserError if there are samples that were made under other conditions."""
        stored = read_about(self.about)["identity"] if self.about.exists() else identity
        for key, value in identity.items():
            if stored.get(key) != value:
                raise UserError(
                    f"{self.path} was made with another {key} ({stored.get(key)!s:.60}, "
                    f"now {value!s:.60}); choose another --out"
                )

    def others(self) -> list[str]:
        """Results of other checkpoints and tasks in the same --out, as "checkpoint on task"."""
        found = sorted(self.folder.parent.glob("*/*.json"))
        return [f"{path.parent.name} on {path.stem}" for path in found if path != self.about]

    def begin(self, identity: dict, about: dict) -> None:
        """State the conditions, and keep the count of what earlier sessions took."""
        # another checkpoint of the same command may have the same weights, but other prompts
        self.check(identity)
        generated = {"tokens": 0, "seconds": 0.0}
        if self.about.exists():
            generated = read_about(self.about)["generated"]
        self.stated = {"identity": identity, "about": about, "generated": generated}
        self._state()

    def finish(self, rows: Rows, tokens: int, seconds: float, totals: dict | None = None) -> None:
        """Write all samples in order, then remove the parts.

        Args:
            tokens, seconds: What was generated since `begin`, and how long that took.
            totals: What all samples took, where that is known; it replaces the counts.
        """
        self.check(self.stated["identity"])  # another command may have begun in the same place
        generated = self.stated["generated"]
        generated["tokens"] += tokens
        generated["seconds"] += seconds
        generated |= totals or {}
        self._state()
        replace_file(self.path, "".join(json_line(rows[key]) for key in sorted(rows)))
        for part in self.parts():
            part.unlink()

    def _state(self) -> None:
        about = json.dumps(with_sha256(self.stated), indent=2, ensure_ascii=False)
        replace_file(self.about, about + "\n")


def json_line(row: Row) -> str:
    """A row as a line of a .jsonl file, with its checksum."""
    line = json.dumps(row | {"crc32": ""}, ensure_ascii=False)
    checksum = zlib.crc32(line.encode("utf-8", "surrogatepass"))
    return f'{line[:-2]}{checksum:08x}"}}\n'


def _row(line: bytes) -> Row | None:
    """The row of a line; None if it is no row, or not as it was written."""
    try:
        text = line.decode("utf-8", "surrogatepass")
        row = json.loads(text)
        found = CHECKSUM.search(text)
        if found:
            written = text[: found.start(1)] + '"}'
            if zlib.crc32(written.encode("utf-8", "surrogatepass")) != int(found[1], 16):
                return None
        row.pop("crc32", None)
        is_row = type(row["problem"]) is int and type(row["sample"]) is int
        return row if is_row else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def read_about(path: Path) -> Row:
    """What the .json file beside samples states: their identity, what about them, what they took.

    Raises UserError.
    """
    stated = read_checked(path, "delete it with its samples, and they are made again")
    fields = Fields(stated, path)
    fields.get("identity", dict, {})
    fields.get("about", dict, {})
    generated = fields.part("generated")
    for name in generated.values:
        generated.get(name, float)
    return stated


# --- figures --------------------------------------------------------------------------------------


class Interval(NamedTuple):
    """A mean over problems and its 95 % interval (NaN where there is a single problem)."""

    mean: float
    low: float
    high: float


class Figures(NamedTuple):
    """What the samples of one checkpoint on one task say.

    samples: per problem. rates: accuracy, then pass@k and majority@k. lenient, math_verify,
    unparsed, truncated: shares of all samples (math_verify: None on code). tokens: their mean.
    """

    problems: int
    samples: int
    rates: dict[str, Interval]
    lenient: float
    math_verify: float | None
    unparsed: float
    truncated: float
    tokens: float
    tokens_longest: int
    tokens_per_second: float | None

    def flat(self) -> dict:
        """One dict with the rates in their place, as summary.json holds it."""
        found = {}
        for name, value in self._asdict().items():
            if name == "rates":
                found |= value
            else:
                found[name] = value
        return found

    @classmethod
    def of_flat(cls, found: dict) -> "Figures":
        """The figures that `flat` gave, read back."""
        own = {name: found[name] for name in cls._fields if name != "rates"}
        rates = {name: Interval(*value) for name, value in without(found, own).items()}
        return cls(rates=rates, **own)


class Summary(NamedTuple):
    """The figures of one checkpoint on one task."""

    checkpoint: str
    task: str
    figures: Figures


class Comparison(NamedTuple):
    """A checkpoint less another one on a task.

    paired: eval.stats.Paired, and under "asked_differently" the conditions that differ.
    """

    checkpoint: str
    other: str
    task: str
    paired: dict


@dataclasses.dataclass
class Report:
    """What summary.json holds: the figures of the last command, and those that earlier ones left.

    conditions: how the last command made its figures; training: those of them on trained questions.
    earlier: of each earlier command what of it is still shown, as (checkpoint, task), and its
    conditions.
    """

    conditions: list[str]
    training: list[str]
    summaries: list[Summary]
    comparisons: list[Comparison]
    trained_on: list[list]
    earlier: list[tuple[list[tuple[str, str]], list[str]]] = dataclasses.field(default_factory=list)

    def beside(self, old: "Report | None") -> "Report":
        """This command's report with what an earlier one has and this has not."""
        if old is None:
            return self
        own = {s[:2] for s in self.summaries}
        commands, rest = [], {s[:2] for s in old.summaries} - own
        for names, conditions in old.earlier:
            kept = [name for name in names if name in rest]
            rest.difference_update(kept)
            if kept:
                commands.append((kept, conditions))
        if rest:
            commands.insert(0, (sorted(rest), old.conditions))
        comparisons = list(self.comparisons)
        for comparison in old.comparisons:
            checkpoint, other, task, _ = comparison
            if own.isdisjoint({(checkpoint, task), (other, task)}):
                comparisons.append(comparison)
        return dataclasses.replace(
            self,
            summaries=self.summaries + [s for s in old.summaries if s[:2] not in own],
            comparisons=comparisons,
            trained_on=self.trained_on + [t for t in old.trained_on if tuple(t[:2]) not in own],
            earlier=commands,
        )

    def all_conditions(self) -> list[str]:
        """Sentences on how all figures were made."""
        lines = list(self.conditions)
        for names, conditions in self.earlier:
            of = ", ".join(f"{checkpoint} on {task}" for checkpoint, task in names)
            lines += [f"by an earlier command, {of}: {line}" for line in conditions]
        return lines

    def as_json(self) -> dict:
        flat = [[s.checkpoint, s.task, s.figures.flat()] for s in self.summaries]
        return vars(self) | {"summaries": flat}


def read_report(path: Path) -> Report | None:
    """What summary.json holds; None if there is none. Raises UserError."""
    if not path.exists():
        return None
    fix = "delete it; the samples are kept beside it"
    found = read_checked(path, fix)
    try:
        return Report(
            conditions=[str(line) for line in found["conditions"]],
            training=[str(line) for line in found.get("training", ())],
            summaries=[Summary(c, t, Figures.of_flat(f)) for c, t, f in found["summaries"]],
            comparisons=[Comparison(*entry) for entry in found["comparisons"]],
            trained_on=list(found.get("trained_on", ())),
            earlier=[
                ([(c, t) for c, t in names], lines) for names, lines in found.get("earlier", ())
            ],
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise UserError(f"{path} is no summary of an evaluation ({reason(e)}); {fix}") from None


def summarise(rows: Rows, ks: Sequence[int], generated: dict) -> Figures:
    """The figures of graded rows; every problem has the same number of samples.

    Args:
        ks: The k of pass@k and majority@k. Answers that are not voted on have no majority.
        generated: The tokens that were generated and the seconds that it took.
    """
    every = [rows[key] for key in sorted(rows)]
    problems = len({problem for problem, _ in rows})
    n = len(rows) // problems

    def mean_of(name):
        return sum(row[name] for row in every) / len(every)

    is_verified = all(row["math_verify"] is not None for row in every)
    seconds = generated["seconds"]
    return Figures(
        problems=problems,
        samples=n,
        rates=_rates(every, n, [k for k in ks if k > 1]),
        lenient=mean_of("lenient"),
        math_verify=mean_of("math_verify") if is_verified else None,
        unparsed=sum(not row["parsed"] for row in every) / len(every),
        truncated=sum(not row["stopped"] for row in every) / len(every),
        tokens=mean_of("tokens"),
        tokens_longest=max(row["tokens"] for row in every),
        tokens_per_second=generated["tokens"] / seconds if seconds else None,
    )


def _rates(every: list[Row], n: int, ks: list[int]) -> dict[str, Interval]:
    """Accuracy, pass@k and majority@k of rows in their order, n of each problem."""
    has_votes = not any(row["vote"] is False for row in every)
    per_problem = defaultdict(list)
    for start in range(0, len(every), n):
        votes = [row["vote"] for row in every[start : start + n]]
        correct = [row["strict"] for row in every[start : start + n]]
        per_problem["accuracy"].append(sum(correct) / n)
        for k in ks:
            per_problem[f"pass@{k}"].append(pass_at_k(n, sum(correct), k))
        for k in ks if has_votes else ():
            per_problem[f"majority@{k}"].append(majority_at_k(votes, correct, k))
    values_PX = np.array(list(per_problem.values())).T
    rates = {}
    for name, low, high in zip(per_problem, *intervals(values_PX), strict=True):
        rates[name] = Interval(float(np.mean(per_problem[name])), float(low), float(high))
    return rates


def compare(rows: Rows, others: Rows) -> Paired:
    """`rows` less `others` on one task, over the problems that both have."""
    ours, theirs = counts(rows), counts(others)
    both = sorted(ours.keys() & theirs.keys())
    return paired([theirs[key] for key in both], [ours[key] for key in both])


def counts(rows: Rows) -> dict[tuple[int, str], tuple[int, int]]:
    """{(problem, its question): (samples, right samples)}."""
    found = {}
    for row in rows.values():
        key = row["problem"], row["question"]
        n, right = found.get(key, (0, 0))
        found[key] = (n + 1, right + row["strict"])
    return found


# --- conditions -----------------------------------------------------------------------------------

# What a comparison depends on besides the two models and the kind of prompt.
PROMPT_CONDITIONS = ("system", "instruction", "prefill", "chat_template_kwargs")


def asked_differently(ours: dict | None, theirs: dict | None) -> dict[str, tuple]:
    """The conditions in which two results of one task differ, seeds aside.

    Args:
        ours, theirs: What their <task>.json states; None where there is no such file.

    Returns:
        {name: (ours, theirs)}, empty if both were asked alike.
    """
    if not ours or not theirs:
        return {"conditions not known": ("-" if ours else None, "-" if theirs else None)}
    here, there = conditions(ours), conditions(theirs)
    differing = {name: (here[name], there[name]) for name in here if here[name] != there[name]}
    if differing.keys() & {"prompt", *PROMPT_CONDITIONS}:
        differing.pop("template", None)  # the first prompt differs by what is named already
    return differing


def conditions(stated: dict) -> dict:
    """What an evaluation depends on besides its model, its test set and the seed."""
    identity, prompt = stated["identity"], stated["identity"]["prompt"]
    return {
        "prompt": prompt.get("kind"),
        **{name: prompt.get(name) or None for name in PROMPT_CONDITIONS},
        "temperature": identity.get("temperature"),
        "top_p": identity.get("top_p"),
        # fewer than were asked for, where the model has no positions for them
        "max_tokens": stated["about"].get("new_tokens", identity.get("max_tokens")),
        "template": prompt.get("first_prompt"),  # how the template renders one question
    }
