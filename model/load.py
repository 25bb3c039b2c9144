"""A checkpoint to be evaluated or talked to: found and described first, its weights read when they are needed."""

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path

import torch

from data.tokenizer import Tokenizer
from errors import UserError
from files import read_json
from model import lineage, parallel
from model.checkpoint import (
    ADAPTER,
    base_of,
    build_model,
    locate,
    read_config,
    stop_ids_of,
    tokenizer_folder,
)
from model.transformer import ModelConfig
from run import RunFolder, run_of


@dataclasses.dataclass
class Subject:
    """name: as the user wrote it; run: the folder of the run that trained it, or None; settings: that run's config, of a checkpoint that was
    taken out of its run's folder what its record says of the training prompts, else {}."""

    name: str
    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    stop_ids: list
    run: Path | None
    settings: dict

    @property
    def vocab(self):
        return min(self.tokenizer.size, self.config.vocab_size)

    @cached_property
    def sha256(self):
        """Of config and weights, read once by rank 0."""
        digest = hashlib.sha256()
        files = {
            f
            for d in (base_of(self.folder), self.folder)
            for pattern in ("*.safetensors", ADAPTER)
            for f in d.glob(pattern)
        }
        for file in sorted(files) if parallel.rank() == 0 else ():
            with open(file, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        digest.update(repr(self.config).encode())
        return parallel.broadcast(digest.hexdigest())

    @property
    def label(self):
        """A folder's name for its results: readable, and another one for other weights."""
        name = f"{self.run.name}-{self.folder.name}" if self.run else Path(self.name).resolve().name
        return f"{name}-{self.sha256[:6]}"

    def model(self):
        device, dtype = (
            ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        )
        return build_model(
            self.config, self.folder, device=device, seed=0, weight_dtype=dtype
        ).eval()


def find(name, tokenizer=""):
    """The Subject of a folder in Hugging Face or PEFT form, a run's folder (its newest checkpoint), or a hub id."""
    folder = Path(name)
    if steps := RunFolder(folder).steps():
        folder = RunFolder(folder).step_folder(steps[-1])
    folder = locate(str(folder), "checkpoint")
    if folder is None:
        raise UserError(
            f"checkpoint {name}: a preset has random weights and no tokenizer; name a folder"
        )
    tokenizer, config, run = (
        Tokenizer.load(tokenizer or tokenizer_folder(folder)),
        read_config(name, folder),
        run_of(folder),
    )
    stop_ids = list(dict.fromkeys([*tokenizer.stop_ids(), *stop_ids_of(folder)]))
    settings = (
        read_json(run / "config.json")
        if run and (run / "config.json").is_file()
        else lineage.prompt_of(folder)
    )
    return Subject(str(name), folder, config, tokenizer, stop_ids, run, settings)
