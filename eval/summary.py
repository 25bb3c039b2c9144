"""What an evaluation leaves behind: every sample as a line of JSON, what it was asked under, and the figures of both.

`<out>/<checkpoint>/<task>.json` states prompt, template, test set and sampling, with hashes; `<task>.part-<rank>.jsonl` gets a line
for every finished sample, so that a killed evaluation goes on; `<task>.jsonl` holds all of them in order, graded, at the end.
"""

import json

import numpy as np

from errors import RunFailed, UserError
from eval.stats import intervals, majority_at_k, paired, pass_at_k
from files import read_json, replace_file


class Samples:
    """The samples of one checkpoint on one task, by (problem, sample)."""

    def __init__(self, folder, task):
        self.folder, self.task = folder, task
        self.path, self.about = folder / f"{task}.jsonl", folder / f"{task}.json"

    def parts(self):
        return sorted(self.folder.glob(f"{self.task}.part-*.jsonl"))

    def read(self):
        """{(problem, sample): row} of all that was kept so far; a line that was cut off while written is none."""
        found = {}
        for file in [*self.parts(), self.path] if self.folder.is_dir() else ():
            if file.exists():
                for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
                    try:
                        row = json.loads(line)
                        found[row["problem"], row["sample"]] = row
                    except (ValueError, KeyError, TypeError):
                        continue
        return found

    def agree(self, identity):
        """Refuse samples that were made under other conditions."""
        stored = read_json(self.about)["identity"] if self.about.exists() else identity
        for key, value in identity.items():
            if stored.get(key) != value:
                raise UserError(
                    f"{self.path} was made with another {key} ({_short(stored.get(key))}, now {_short(value)}); choose another --out"
                )

    def others(self):
        """Results of other checkpoints and tasks in the same --out, as "checkpoint on task"."""
        found = sorted(self.folder.parent.glob("*/*.json"))
        return [f"{path.parent.name} on {path.stem}" for path in found if path != self.about]

    def begin(self, identity, about):
        """State the conditions; the time that earlier sessions took is kept."""
        self.agree(
            identity
        )  # another checkpoint of this very command may have the same weights, and other prompts
        generated = (
            read_json(self.about)["generated"]
            if self.about.exists()
            else {"tokens": 0, "seconds": 0.0}
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"--out: {self.folder} cannot be made ({e.strerror})") from None
        self.stated = {"identity": identity, "about": about, "generated": generated}
        replace_file(self.about, json.dumps(self.stated, indent=2, ensure_ascii=False) + "\n")

    def finish(self, rows, tokens, seconds, whole=()):
        """Write all samples in order, then drop the parts; `tokens` were generated in `seconds` since `begin`. whole: what all of them took, where that is known."""
        self.agree(self.stated["identity"])  # another command may have begun in the same place
        self.stated["generated"] = {
            k: self.stated["generated"][k] + v
            for k, v in (("tokens", tokens), ("seconds", seconds))
        } | dict(whole)
        replace_file(self.about, json.dumps(self.stated, indent=2, ensure_ascii=False) + "\n")
        replace_file(self.path, "".join(line(rows[key]) for key in sorted(rows)))
        for part in self.parts():
            part.unlink()


def line(row):
    return json.dumps(row, ensure_ascii=False) + "\n"


def _short(value):
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


# --- figures -------------------------------------------------------------------------------------------------------


def summarise(rows, ks, generated):
    """The figures of {(problem, sample): graded row}, every problem with the same number of samples. Quantities over problems come
    as [mean, low, high]; None: not defined here (math-verify on code, an answer that is not put to the vote)."""
    problems = {}
    for key in sorted(rows):
        problems.setdefault(key[0], []).append(rows[key])
    every, n = list(rows.values()), len(next(iter(problems.values())))
    voted = all(row["vote"] is not False for row in every)
    per_problem = {
        "accuracy": [],
        **{f"pass@{k}": [] for k in ks if k > 1},
        **{f"majority@{k}": [] for k in ks if k > 1 and voted},
    }
    for samples in problems.values():
        right = [row["strict"] for row in samples]
        for name, values in per_problem.items():
            kind, _, k = name.partition("@")
            at = {
                "accuracy": lambda: sum(right) / n,
                "pass": lambda: pass_at_k(n, sum(right), int(k)),
                "majority": lambda: majority_at_k([row["vote"] for row in samples], right, int(k)),
            }
            values.append(at[kind]())
    values_PX = np.array(list(per_problem.values())).T
    low_X, high_X = intervals(values_PX)
    figures = {
        name: [float(values_PX[:, i].mean()), float(low_X[i]), float(high_X[i])]
        for i, name in enumerate(per_problem)
    }
    mean = lambda values: sum(values) / len(values)
    lengths = [row["tokens"] for row in every]
    return (
        {"problems": len(problems), "samples": n}
        | figures
        | {
            "lenient": mean([row["lenient"] for row in every]),
            "math_verify": None
            if any(row["math_verify"] is None for row in every)
            else mean([row["math_verify"] for row in every]),
            "unparsed": mean([not row["parsed"] for row in every]),
            "truncated": mean([not row["stopped"] for row in every]),
            "tokens": mean(lengths),
            "tokens_longest": max(lengths),
            "tokens_per_second": generated["tokens"] / generated["seconds"]
            if generated["seconds"]
            else None,
        }
    )


def compare(rows, others):
    """The paired figures of two results of one task over the problems that both have: those of `rows` less those of `others`."""
    ours, theirs = counts(rows), counts(others)
    both = sorted(ours.keys() & theirs.keys())
    return paired([theirs[key] for key in both], [ours[key] for key in both])


# What a comparison depends on besides the two models: {name for a report: key in a prompt's stated conditions}; and of the sampling's.
PROMPT_CONDITIONS = {
    "prompt": "kind",
    "system": "system",
    "instruction": "instruction",
    "prefill": "prefill",
    "chat_template_kwargs": "chat_template_kwargs",
}
SAMPLING_CONDITIONS = ("temperature", "top_p", "max_tokens")


def asked_differently(ours: dict | None, theirs: dict | None) -> dict:
    """{name: (ours, theirs)} of the conditions in which two results of one task differ, {} where both were asked alike (seeds aside).
    ours, theirs: what their <task>.json states; None where that is not there, and then nobody knows."""
    if not ours or not theirs:
        return {"conditions not known": ("-" if ours else None, "-" if theirs else None)}
    conditions = [_conditions(stated) for stated in (ours, theirs)]
    differing = {
        name: (value, conditions[1][name])
        for name, value in conditions[0].items()
        if value != conditions[1][name]
    }
    if any(name in differing for name in PROMPT_CONDITIONS):
        differing.pop("template", None)  # the first prompt differs by what is named already
    return differing


def _conditions(stated):
    identity, prompt = stated["identity"], stated["identity"]["prompt"]
    found = {name: prompt.get(key) or None for name, key in PROMPT_CONDITIONS.items()}
    found |= {name: identity.get(name) for name in SAMPLING_CONDITIONS}
    found["max_tokens"] = stated["about"].get(
        "new_tokens", found["max_tokens"]
    )  # fewer where the model has no positions for them
    return found | {
        "template": prompt.get("first_prompt")
    }  # as the chat templates make it: of one question


def asked(differing: dict) -> str:
    """A cell that says whether a pair was asked alike."""
    return "differently: " + ", ".join(differing) if differing else "alike"


def counts(rows):
    """{(problem, its question): (samples, right samples)}."""
    found = {}
    for row in rows.values():
        n, right = found.get(key := (row["problem"], row["question"]), (0, 0))
        found[key] = (n + 1, right + row["strict"])
    return found


# --- tables and a picture ------------------------------------------------------------------------------------------


def _cell(name, value):
    if value is None:
        return "-"
    if isinstance(value, list):
        return (
            f"{value[0]:.1%}"
            if np.isnan(value[1])
            else f"{100 * value[0]:.1f} [{100 * value[1]:.1f}, {100 * value[2]:.1f}]"
        )
    if name in ("lenient", "math_verify", "unparsed", "truncated"):
        return f"{100 * value:.1f}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def table(summaries):
    """Rows of strings, the heading first: summaries is [(checkpoint, task, figures)]. Rates in %, intervals of 95 % over problems."""
    names = list(dict.fromkeys(name for _, _, figures in summaries for name in figures))
    first = [n for n in names if n in ("problems", "samples", "accuracy") or "@" in n]
    names = [*first, *(n for n in names if n not in first and n != "tokens_longest")]
    heading = [
        "checkpoint",
        "task",
        *(n.replace("tokens_per_second", "tokens/s").replace("_", "-") for n in names),
    ]
    return [heading, *([c, t, *(_cell(n, f.get(n)) for n in names)] for c, t, f in summaries)]


def comparison_table(comparisons):
    """[(checkpoint, other, task, paired figures)] as rows of strings."""
    heading = [
        "checkpoint",
        "minus",
        "task",
        "problems",
        "difference",
        "p (sign flips)",
        "better on",
        "worse on",
        "asked",
    ]
    cells = lambda f: [
        str(f["problems"]),
        _cell("", [f["difference"], f["low"], f["high"]]),
        f"{f['p']:.2g}",
        str(f["better"]),
        str(f["worse"]),
        asked(f["asked_differently"]),
    ]
    return [heading, *([c, o, t, *cells(f)] for c, o, t, f in comparisons)]


def aligned(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )


def markdown(rows):
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def draw(summaries, path):
    """summary.png: accuracy with its interval and, lighter, pass@k, by task and checkpoint."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks, names = (list(dict.fromkeys(s[i] for s in summaries)) for i in (1, 0))
    figure, ax = plt.subplots(figsize=(4.5 + 1.3 * len(tasks) * max(1, len(names) / 2), 3.8))
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for i, name in enumerate(names):
        for task, figures in ((t, f) for c, t, f in summaries if c == name):
            x = tasks.index(task) + 0.7 * ((i + 0.5) / len(names) - 0.5)
            shown = ["accuracy", *(k for k in figures if k.startswith("pass@"))]
            for j, key in enumerate(shown):
                mean, low, high = figures[key]
                style = dict(
                    color=colours[i % len(colours)],
                    alpha=1.0 if j == 0 else 0.45,
                    marker="o" if j == 0 else "^",
                    capsize=3,
                )
                label = (
                    f"{name}{'' if j == 0 else ' ' + key}"
                    if task == next(t for c, t, _ in summaries if c == name)
                    else None
                )
                ax.errorbar(
                    x + 0.04 * j,
                    100 * mean,
                    [[100 * max(0, mean - low)], [100 * max(0, high - mean)]],
                    ls="",
                    label=label,
                    **style,
                )
    ax.set(
        xticks=range(len(tasks)),
        xticklabels=tasks,
        xlim=(-0.6, len(tasks) - 0.4),
        ylim=(0, 100),
        ylabel="% of problems (95 % interval)",
    )
    ax.grid(axis="y", alpha=0.3)
    ax.legend(
        fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1)
    )  # beside the points, not on them
    figure.tight_layout()
    try:
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise RunFailed(
            f"{path} could not be written ({e.strerror}); the samples and tables are whole"
        ) from None
    finally:
        plt.close(figure)
