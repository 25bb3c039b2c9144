"""The table of all options of train.py: python -m tests.options_table > docs/options.md"""

from dataclasses import fields

import options
from config import Config

HEAD = """# Options of train.py

```sh
python train.py --help
```

Made by `python -m tests.options_table > docs/options.md`. Defaults are those of the toy task and,
where they differ, of pretrained models (docs/training.md says which hold), with others in GRPO
where that is said. Defaults that follow further options are in `--help`.

| option | toy | pretrained | meaning |
|---|---|---|---|
"""


def default_of(name: str, whose: str) -> str:
    """An option's default in SFT and KD, and in GRPO where that is another."""
    shown = []
    for mode in ("kd", "grpo"):
        value = options.with_defaults(Config, {"mode": mode, "defaults": whose})[name]
        shown.append("empty" if value == "" else f"`{value}`")
    return shown[0] if shown[0] == shown[1] or name == "mode" else f"{shown[0]}; grpo {shown[1]}"


def row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def table() -> str:
    """The page: a line for each option, in the sections of --help."""
    page = HEAD
    for spec in fields(Config):
        rules = spec.metadata["rules"]
        if spec.name in Config.sections:
            page += row(f"**{Config.sections[spec.name]}**", "", "", "")
        toy, pretrained = default_of(spec.name, "toy"), default_of(spec.name, "pretrained")
        choices = options._shape(spec).choices or rules.named
        meaning = f"{rules.help} ({', '.join(choices)})" if choices else rules.help
        conditions = options._conditions(Config, spec.name)
        if conditions:
            meaning += f" [read with {options._describe(conditions)}]"
        page += row(f"`--{spec.name}`", toy, "" if pretrained == toy else pretrained, meaning)
    return page


if __name__ == "__main__":
    print(table(), end="")
