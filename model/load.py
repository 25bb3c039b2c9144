"""Models by their names: what can be known before weights are read, and then the weights.

Training (policy, teacher, reference) and evaluation build their models here and nowhere else.
"""

import dataclasses
import hashlib
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch

from data.tokenizer import Tokenizer, shared_vocabulary
from digests import file_sha256, verify
from errors import UserError
from files import Fields, Json, read_json, resolved
from kernels.cpu import choose_threads
from locks import use
from model import lineage, parallel
from model.checkpoint import (
    ADAPTER,
    base_of,
    build_model,
    empty_model,
    fill_model,
    load_adapter,
    locate,
    read_config,
    stop_ids_of,
    tokenizer_folder,
)
from model.lora import LoraConfig, adapt, adapters
from model.presets import PRESETS, RANDOM
from model.sharding import shard
from model.transformer import ModelConfig, Transformer
from run import RunFolder, newest_checkpoint, run_of


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model that the user named, before its weights are read.

    name: As the user wrote it: a folder, a hub id, or a preset.
    folder: Where its files are; None for a preset, whose weights are random.
    config: The model's shape.
    tokenizer: The one in its folder; None for a preset.
    dropped: Layers of its files that `config` leaves out.
    """

    name: str
    folder: Path | None
    config: ModelConfig
    tokenizer: Tokenizer | None
    dropped: tuple[int, ...] = ()

    @property
    def parameters(self) -> int:
        """How many parameters the model has."""
        model = empty_model(self.config, torch.float32, None)
        return sum(p.numel() for p in model.parameters())


def describe(name: str, option: str, read_tokenizer: bool = True) -> Checkpoint:
    """Find a model and read its shape and tokenizer.

    Args:
        name: What the user gave for `option` ("--model", say), which errors name. A run's folder
            stands for its newest checkpoint.
        read_tokenizer: False where another tokenizer is used in its place.

    Raises:
        UserError: There is no such model, or a preset is to be a teacher or a reference and does
            not say `random:` before it.
    """
    preset = name.removeprefix(RANDOM)
    if option != "--model" and preset in PRESETS and preset == name:
        raise UserError(
            f"{option} {name} is a preset, a shape with random weights; name a folder or a hub id "
            f"(as in Qwen/Qwen2.5-0.5B), or write {RANDOM}{name} if that is what you want"
        )
    name = preset if preset in PRESETS else newest_checkpoint(name, option)
    folder, tokenizer = locate(name, option), None
    if folder:
        verified(folder)
        if read_tokenizer:
            tokenizer = Tokenizer.load(tokenizer_folder(folder))
    return Checkpoint(name, folder, read_config(name, folder), tokenizer)


def verified(folder: Path) -> dict[Path, str]:
    """The SHA-256 of a checkpoint's files and its base's, where they are sealed (digests.py).

    Rank 0 reads them. Raises UserError on all ranks for a file that is not what was written.
    """

    def read() -> dict[Path, str]:
        found = {}
        for part in {base_of(folder): None, folder: None}:  # most often the same, read once
            found |= verify(part)
        return found

    return parallel.on_rank_0(parallel.rank(), read)


def without_layers(checkpoint: Checkpoint, layers: str) -> Checkpoint:
    """The checkpoint without the layers of --drop_layers. Raises UserError."""
    config, dropped = checkpoint.config, set()
    if not layers:
        return checkpoint
    for part in layers.replace(" ", "").split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise UserError(f"--drop_layers: {part!r} is no layer and no range; write 3,5,8-10")
        found = range(int(first), int(last or first) + 1)
        if not found or found[-1] >= config.num_layers:
            raise UserError(
                f"--drop_layers {part}: {checkpoint.name} has the layers 0 to "
                f"{config.num_layers - 1}"
            )
        dropped.update(found)
    kept = [layer for layer in range(config.num_layers) if layer not in dropped]
    if not kept:
        raise UserError("--drop_layers leaves no layer; name fewer")
    windows = tuple(config.window(layer) for layer in kept) if config.windows else ()
    smaller = dataclasses.replace(config, num_layers=len(kept), windows=windows)
    return dataclasses.replace(checkpoint, config=smaller, dropped=tuple(sorted(dropped)))


def policy_vocab_size(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """How many ids a policy may sample: those of its tokenizer. The head may have more rows."""
    if tokenizer.size > config.vocab_size:
        raise UserError(
            f"{tokenizer.source} has {tokenizer.size:,} ids but the model only "
            f"{config.vocab_size:,}; name another --tokenizer"
        )
    return tokenizer.size


def shared_vocab_size(tokenizer: Tokenizer, config: ModelConfig, other: Checkpoint) -> int:
    """How many head rows a model and another one share: the same ids mean the same tokens there."""
    shared = policy_vocab_size(tokenizer, config)
    if other.tokenizer is not None:
        shared = shared_vocabulary(tokenizer, other.tokenizer)
    return min(shared, config.vocab_size, other.config.vocab_size)


def load_policy(
    checkpoint: Checkpoint,
    resumed: Path | None,
    lora: LoraConfig | None,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int,
    mesh: Any = None,
) -> tuple[Any, Transformer | None]:
    """The model that is trained, and the base under its adapters (itself without LoRA, or None).

    Master weights are fp32 (fp64 in an fp64 run); what LoRA freezes is held in the compute dtype.

    Args:
        resumed: The checkpoint of this run that is continued, or None.
        lora: Train adapters of this kind; None: train the model itself.
        seed: Of the weights of a preset, and of new adapters.
        mesh: Of the ranks that share it, or None. The base of adapters is then in no model of its
            own.
    """
    master = torch.promote_types(compute_dtype, torch.float32)
    # A resumed adapter goes back onto the base as it was: what was merged is not unmerged.
    is_new = resumed is None or lora is not None
    if lora and mesh:
        policy = _sharded_with_adapters(checkpoint, lora, device, compute_dtype, seed, mesh)
        if resumed:
            load_adapter(policy, resumed / "adapter")
        return policy, None
    base = build_model(
        checkpoint.config,
        checkpoint.folder if is_new else resumed,
        device=device,
        seed=seed,
        weight_dtype=compute_dtype if lora else master,
        compute_dtype=compute_dtype,
        dropped=checkpoint.dropped if is_new else (),
        mesh=mesh,
    )
    if lora is None:
        return base, base
    policy = adapt(base, lora, seed, master)
    if resumed is not None:
        load_adapter(policy, resumed / "adapter")
    return policy, base


def _sharded_with_adapters(
    checkpoint: Checkpoint,
    lora: LoraConfig,
    device: torch.device,
    compute_dtype: torch.dtype,
    seed: int,
    mesh: Any,
) -> Any:
    """A model with new adapters, in shards."""
    master = torch.promote_types(compute_dtype, torch.float32)
    base = empty_model(checkpoint.config, compute_dtype, compute_dtype)
    policy = adapt(base, lora, seed, master)
    shard(policy, mesh, device)
    for name, p in policy.named_parameters():
        if ".lora_" not in name:  # what is filled in there is the policy's
            layer, _, leaf = name.rpartition(".")
            setattr(base.get_submodule(layer), leaf, p)
    fill_model(base, checkpoint.folder, seed, checkpoint.dropped)
    for layer in adapters(policy).values():
        layer.init_weights(seed)
    return policy


def load_frozen(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, seed: int, mesh: Any = None
) -> Transformer:
    """A model that is only read, its weights in `dtype`: a teacher or a reference."""
    model = build_model(
        checkpoint.config,
        checkpoint.folder,
        device=device,
        seed=seed,
        weight_dtype=dtype,
        dropped=checkpoint.dropped,
        mesh=mesh,
    )
    return model.requires_grad_(False)


def peft_base_name(checkpoint: Checkpoint) -> str:
    """What an adapter on this model names as its base, for PEFT: a hub id or a folder.

    Empty where PEFT has no name for it: random weights, a model without some of its layers, and an
    adapter merged into its base.
    """
    folder, name = checkpoint.folder, checkpoint.name
    if folder is None or checkpoint.dropped or (folder / ADAPTER).is_file():
        return ""
    is_hub_id = name not in PRESETS and not Path(name).is_dir()
    return name if is_hub_id else str(resolved(folder))


@dataclasses.dataclass
class Subject:
    """A checkpoint that is evaluated or talked to; its weights are read by `model()`.

    name: As the user wrote it.
    run: The folder of the run that trained it, or None.
    sha256_of: Of files that were verified.
    held: Keeps the run from removing the checkpoint.
    settings: That run's config.json; of a checkpoint that was taken out of its run's folder, what
        its record says of the training prompts; else {}.
    """

    name: str
    folder: Path
    config: ModelConfig
    tokenizer: Tokenizer
    stop_ids: list[int]
    run: Path | None
    settings: Json
    sha256_of: dict[Path, str] = dataclasses.field(default_factory=dict)
    held: IO[bytes] | None = None

    @property
    def vocab(self) -> int:
        """How many ids it may sample."""
        return min(self.tokenizer.size, self.config.vocab_size)

    @cached_property
    def sha256(self) -> str:
        """Of the config and the weight files, which rank 0 reads once."""
        digest = hashlib.sha256()
        if parallel.rank() == 0:
            files = set()
            for folder in (base_of(self.folder), self.folder):
                files.update(folder.glob("*.safetensors"))
                files.update(folder.glob(ADAPTER))
            for path in sorted(files):
                found = self.sha256_of.get(path) or file_sha256(path)
                digest.update(bytes.fromhex(found))
        digest.update(repr(self.config).encode())
        return parallel.broadcast(digest.hexdigest())

    @property
    def label(self) -> str:
        """A name for the folder of its results: readable, and another one for other weights."""
        name = resolved(self.name).name
        if self.run:
            name = f"{self.run.name}-{self.folder.name}"
        return f"{name}-{self.sha256[:6]}"

    def model(self) -> Transformer:
        """Its weights on the GPU in bf16, or on the CPU in fp32."""
        device, dtype = "cpu", torch.float32
        if torch.cuda.is_available():
            device, dtype = "cuda", torch.bfloat16
        else:
            empty = empty_model(self.config, dtype, None)
            choose_threads(sum(p.numel() for p in empty.parameters()))
        model = build_model(self.config, self.folder, device=device, seed=0, weight_dtype=dtype)
        return model.eval().requires_grad_(False)


def find(name: str, tokenizer: str = "") -> Subject:
    """Describe a checkpoint for evaluation.

    Args:
        name: A folder in Hugging Face or PEFT form, a run's folder (its newest checkpoint is
            meant), or a hub id.
        tokenizer: A folder with another tokenizer.json.
    """
    newest, held = _hold_newest(Path(name))
    folder = locate(str(newest), "checkpoint")
    if folder is None:
        raise UserError(
            f"checkpoint {name}: a preset has random weights and no tokenizer; name a folder"
        )
    sha256_of = verified(folder)
    loaded = Tokenizer.load(tokenizer or tokenizer_folder(folder))
    run, settings = run_of(folder), Fields(lineage.prompt_of(folder), folder)
    if run and (run / "config.json").is_file():
        settings = Fields(read_json(run / "config.json"), run / "config.json")
    return Subject(
        name=str(name),
        folder=folder,
        config=read_config(name, folder),
        tokenizer=loaded,
        stop_ids=stop_ids(loaded, folder),
        run=run,
        settings={n: settings.get(n, str) for n in lineage.PROMPT_OPTIONS if n in settings.values},
        sha256_of=sha256_of,
        held=held,
    )


def _hold_newest(folder: Path) -> tuple[Path, IO[bytes] | None]:
    """The newest checkpoint of a run's folder, which the run then does not remove.

    Any other folder as it is. Rank 0 chooses.
    """
    held = None

    def choose() -> Path:
        nonlocal held
        while steps := RunFolder(folder).steps():
            newest = RunFolder(folder).step_folder(steps[-1])
            held = use(newest / "config.json")
            if held or newest.is_dir():  # else the run has removed it meanwhile
                return newest
        held = use(folder / "config.json") if run_of(folder) else None
        return Path(newest_checkpoint(str(folder), "checkpoint"))  # refuses a run without any

    return parallel.on_rank_0(parallel.rank(), choose), held


def stop_ids(tokenizer: Tokenizer, folder: Path | None) -> list[int]:
    """The ids that end an answer: the tokenizer's, then those in the checkpoint's configuration."""
    return list(dict.fromkeys([*tokenizer.stop_ids(), *stop_ids_of(folder)]))
