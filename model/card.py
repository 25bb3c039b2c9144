"""The model card of a checkpoint: README.md, in the form that the Hugging Face hub reads."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint import HUB_ID

CARD = "README.md"
LICENCE = re.compile(r"^license:[ \t]*(\S[^\n]*)$", re.MULTILINE)


def licence_of(folder: str | Path) -> str:
    """The licence that a model's own card states; "" where nothing is known of it."""
    card = Path(folder) / CARD
    try:
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    except OSError:
        return ""
    front = text.split("---", 2)[1] if text.startswith("---") else ""
    found = LICENCE.search(front)
    return found[1].strip().strip("\"'") if found else ""


def model_card(
    step: int,
    settings: Mapping[str, Any],
    weights: Mapping[str, str],
    metrics: Mapping[str, float],
    command: Sequence[str],
) -> str:
    """The card of a checkpoint.

    Args:
        settings: The options of its run.
        weights: Where those of its models are from, as in {"policy": "a/folder"}.
        metrics: What was measured of it in its run.
        command: That of the run.
    """
    base, licence = settings["model"], licence_of(weights["policy"])
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        front.append(f"base_model: {base}")
    if licence:
        front.append(f"license: {licence}")
    facts = [f"model: {base}, weights: {weights['policy']}"]
    facts += [f"{name}: {source}" for name, source in weights.items() if name != "policy"]
    facts += [f"data: {settings['data']}", f"method: {settings['mode']}, after step {step}"]
    facts.append(f"licence of the model that it began from: {licence or 'not known'}")
    found = [f"{name}: {value:.4g}" for name, value in metrics.items() if name.startswith("eval/")]
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        f"# {Path(base).name}, {settings['mode']}",
        "A checkpoint of srlm.",
        "\n".join(f"- {fact}" for fact in facts),
        "## Measured on its validation examples",
        "\n".join(f"- {line}" for line in found) or "Nothing.",
        "## Command",
        f"```sh\n{shlex.join(command)}\n```",
        "## Options",
        f"```json\n{json.dumps(dict(settings), indent=2)}\n```",
    ]
    return "\n\n".join(parts) + "\n"
