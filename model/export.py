"""Write a checkpoint for use elsewhere: its weights in bf16, half the size, nothing of the trainer.

python -m model.export runs/my-run my-model
python -m model.export runs/my-run/checkpoints/step-100 my-model --dtype float16
"""

from errors import UserError, as_command, say, system_error  # isort: skip

import dataclasses
import shutil
import sys
from pathlib import Path
from typing import Literal

import torch

import options
from digests import seal
from files import draft_of
from model.card import CARD
from model.checkpoint import build_model, save_model
from model.lineage import HASHES, RECORD
from model.load import find
from options import REQUIRED, option

KEPT = ("generation_config.json", RECORD, HASHES, CARD)  # as they are in the checkpoint


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """Every option of the command."""

    checkpoint: str = option(
        REQUIRED, "a checkpoint's folder, a run's (its newest one) or a hub id", positional=True
    )
    out: str = option(REQUIRED, "the folder that is written", positional=True)
    dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "dtype of the weights")


def export(args: ExportOptions) -> None:
    """Write the folder. Raises UserError if there is one, or no such checkpoint."""
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists; name another folder")
    subject = find(args.checkpoint)
    dtype, draft = getattr(torch, args.dtype), draft_of(out)
    model = build_model(subject.config, subject.folder, device="cpu", seed=0, weight_dtype=dtype)
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{subject.folder}: {name} is not finite in {args.dtype}")
    try:
        draft.mkdir(parents=True)
        save_model(model, draft, subject.tokenizer, subject.stop_ids)
        for name in KEPT:
            if (subject.folder / name).is_file():
                shutil.copyfile(subject.folder / name, draft / name)
        seal(draft)
        draft.rename(out)
    except OSError as e:
        raise system_error(e, f"{out} could not be written") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    say(f"{subject.folder} in {args.dtype}: {out}, {size / 1e6:,.0f} MB")


def main(argv: list[str]) -> int:
    """Run the command; returns its exit code."""
    return as_command("model.export", lambda: export(options.parse(ExportOptions, argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
