"""Hugging Face checkpoints and PEFT adapters, read and written.

Only safetensors and JSON: nothing is ever unpickled.
"""

import dataclasses
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from errors import UserError, say
from files import Json, named, read_json, write_json
from model import lora, parallel, sharding
from model.hf import config_from_hf, config_to_hf
from model.presets import PRESETS
from model.tensors import (
    INDEX,
    SINGLE,
    WRAPPERS,
    Stored,
    open_tensors,
    read_tensor,
    save_tensors,
    stored_tensors,
    stream_tensors,
)
from model.transformer import ModelConfig, Transformer
from progress import Progress

Part = TypeVar("Part")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADAPTER = "adapter_config.json"  # a folder with it is a PEFT adapter, loaded merged into its base
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MOST_IDS = 1 << 24  # of a vocabulary


# --- where a checkpoint is ----------------------------------------------------------------


def _meant(name: str, option: str) -> str:
    """What to name in place of a folder that is not there."""
    run, siblings = Path("runs", name), sorted(Path(name).parent.glob("step-*"))
    if run.is_dir():
        return f"did you mean {run}?"
    if siblings:
        return f"there are {', '.join(map(str, siblings))}"
    if option.startswith("--"):
        return f"presets are {', '.join(PRESETS)}"
    return "name a checkpoint's folder, a run's or a hub id, several with spaces between them"


def locate(name: str, option: str) -> Path | None:
    """The folder of a checkpoint or a PEFT adapter, downloaded if `name` is a hub id.

    None for the name of a preset. Raises UserError, which begins with `option` and the name, also
    for an adapter whose base is not there.
    """
    if name in PRESETS:
        return None
    folder = Path(name)
    if folder.is_dir():
        if not named(base_of(folder) / "config.json"):
            raise UserError(
                f"{option} {name}: the folder has no config.json; name a checkpoint or a run"
            )
        return folder
    if folder.is_file():
        raise UserError(f"{option} {name} is a file; name the folder that it is in")
    local = folder.exists() or name.startswith(("runs/", "checkpoints/"))
    if local or not HUB_ID.fullmatch(name):
        raise UserError(f"{option} {name}: no such folder; {_meant(name, option)}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.safetensors", "*.json", "*.txt", "*.jinja"]
        folder = Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as e:
        raise UserError(
            f"{option} {name}: neither a folder nor a model that the hub gives ({type(e).__name__})"
        ) from None
    base_of(folder)  # refuses an adapter that cannot be used
    return folder


def base_of(folder: Path) -> Path:
    """The folder with the base model of a PEFT adapter; a checkpoint's own.

    An adapter names its base, or the base lies beside it. Raises UserError where the base that it
    names is not here and a complete model lies beside it: that may be the base, or the result of
    merging the adapter into it, and merging twice would be a model that nobody trained.
    """
    file = folder / ADAPTER
    if not named(file):
        return folder
    settings = read_json(file, finite=True)
    lora.check_peft(settings, file)
    name = settings.get("base_model_name_or_path") or ""
    here = bool(name) and Path(name).is_dir()
    if (folder / "config.json").is_file():
        if not name or (here and Path(name).samefile(folder)):
            return folder
        if not here and (named(folder / SINGLE) or named(folder / INDEX)):
            raise UserError(
                f"{file} names the base {name}, which is no folder here, and a complete model lies "
                f"beside it: delete {ADAPTER} if the adapter is merged into that model, or make "
                'base_model_name_or_path "" if it is the base without it'
            )
    if not name:
        raise UserError(
            f"{file}: no base_model_name_or_path; name the base's folder there, "
            "or put its config.json and weights beside it"
        )
    base = locate(name, f"{file}: base_model_name_or_path")
    if base is None or (base / ADAPTER).is_file():
        kind = "an adapter itself" if base else "a preset"
        raise UserError(
            f"{file}: base_model_name_or_path {name} is {kind}; name the folder of a complete model"
        )
    return base


def tokenizer_folder(folder: Path) -> Path:
    """Where a checkpoint's tokenizer is: an adapter often leaves it to its base."""
    return folder if named(folder / "tokenizer.json") else base_of(folder)


def read_config(name: str, folder: Path | None) -> ModelConfig:
    """The ModelConfig of a preset (folder None) or of a checkpoint folder.

    A config.json may say tied while the weights hold another head: then the model is untied, as it
    is for `transformers`. The headers of the weights are read, so missing or damaged files are
    found before anything is loaded.
    """
    if folder is None:
        return PRESETS[name]
    base = base_of(folder)
    config = config_from_hf(read_json(base / "config.json", finite=True), folder)
    stored = stored_tensors(base)
    if config.tie_word_embeddings and has_own_head(base, stored):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    with torch.device("meta"):
        _fit(stored, Transformer(config), base)
    return config


def stop_ids_of(folder: Path | None) -> list[int]:
    """The end-of-sequence ids that a checkpoint's generation_config.json names."""
    path = folder and base_of(folder) / "generation_config.json"
    if not path or not named(path):
        return []
    value = read_json(path, finite=True).get("eos_token_id")
    values = value if isinstance(value, list) else [value]
    ids = [stop_id for stop_id in values if stop_id is not None]
    for stop_id in ids:
        if type(stop_id) is not int or not 0 <= stop_id < MOST_IDS:
            raise UserError(f"{path}: eos_token_id {stop_id!r:.60} is not a token's id")
    return ids


_reported: set[Path] = set()  # checkpoints whose own head was reported


def has_own_head(folder: Path, stored: dict[str, Stored]) -> bool:
    """Whether a checkpoint holds an output head with other values than its embedding.

    Says so once, on rank 0.
    """
    embedding, head = stored.get("embed_tokens.weight"), stored.get("lm_head.weight")
    if embedding is None or head is None:
        return False
    with open_tensors(embedding.file) as a, open_tensors(head.file) as b:
        one, other = read_tensor(a, *embedding[:2]), read_tensor(b, *head[:2])
    if one.shape == other.shape:
        wide = torch.promote_types(one.dtype, other.dtype)
        if torch.equal(one.to(wide), other.to(wide)):
            return False
    if parallel.speaks() and folder not in _reported:
        _reported.add(folder)
        say(
            f"{folder}: config.json says tied, but the weights hold another {head.key}: "
            "it is used, and the model is untied"
        )
    return True


# --- loading ------------------------------------------------------------------------------


def build_model(
    config: ModelConfig,
    folder: Path | None,
    *,
    device: torch.device | str,
    seed: int,
    weight_dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype | None = None,
    dropped: Collection[int] = (),
    mesh: Any = None,
) -> Transformer:
    """A Transformer on `device`: the folder's weights, or random ones from `seed` (folder None).

    dropped: layers of the folder that the model has not. mesh: of the ranks that share it.
    """
    model = empty_model(config, weight_dtype, compute_dtype)
    if mesh:
        sharding.shard(model, mesh, device)
    else:
        model = model.to_empty(device=device)
    return fill_model(model, folder, seed, dropped)


def empty_model(
    config: ModelConfig, dtype: torch.dtype, compute_dtype: torch.dtype | None
) -> Transformer:
    """A Transformer that has no memory yet."""
    with torch.device("meta"):
        return Transformer(config, compute_dtype).to(dtype)


def fill_model(
    model: Transformer, folder: Path | None, seed: int, dropped: Collection[int]
) -> Transformer:
    """Give a model the weights of a folder, or random ones. Returns it."""
    return model.init_weights(seed) if folder is None else load_weights(model, folder, dropped)


@torch.no_grad()
def load_weights(model: Transformer, folder: Path, dropped: Collection[int] = ()) -> Transformer:
    """Copy a checkpoint, or an adapter merged into its base, into the model, cast to its dtype.

    Returns the model. Raises UserError where the tensors do not fit the model.
    """
    wanted = dict(model.named_parameters())
    scale, pairs = 1.0, {}
    if (folder / ADAPTER).is_file():
        lora_config, pairs = read_adapter(folder)
        scale = lora_config.scale
    pairs = _without_layers(pairs, dropped)
    for layer in pairs:
        if f"{layer}.weight" not in wanted:
            raise UserError(f"{folder}: the adapter has a layer {layer} that its base has not")
    stored = _without_layers(stored_tensors(base_of(folder)), dropped)
    found = _fit(stored, model, folder)
    numbers = sum(math.prod(tensor.shape) for tensor in found.values())
    progress = Progress(f"reading {folder}", numbers / 1e6, "million weights", parallel.speaks())
    for name, (file, key, shape) in found.items():
        with open_tensors(file) as tensors:
            tensor = read_tensor(tensors, file, key)
        if pair := pairs.get(name.removesuffix(".weight")):
            _check_pair(name, pair, tensor, folder)
            tensor = lora.merge(tensor, *pair, scale)
        sharding.fill(wanted[name], tensor)
        progress.add(math.prod(shape) / 1e6)
    return model


def _fit(stored: dict[str, Stored], model: Transformer, folder: Path) -> dict[str, Stored]:
    """The stored tensor of each of the model's. Raises UserError where they do not fit."""
    wanted, stored = dict(model.named_parameters()), dict(stored)
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:
        # Some tied checkpoints have the head a second time, and some only under the head's name.
        head = stored.pop("lm_head.weight")
        stored.setdefault("embed_tokens.weight", head)
    for name, (file, key, found) in stored.items():
        if name not in wanted:
            raise UserError(
                f"{file}: unexpected tensor {key}; config.json does not describe these weights"
            )
        shape = list(wanted[name].shape)
        if found != shape:
            raise UserError(f"{file}: {key} has shape {found}, config.json asks for {shape}")
    missing = sorted(set(wanted) - set(stored))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        tied = ""
        if missing == ["lm_head.weight"]:
            tied = "; config.json says that the head is not tied"
        raise UserError(
            f"{folder}: tensor {missing[0]}{more} is missing; the checkpoint is incomplete{tied}"
        )
    return stored


def _without_layers(named_parts: dict[str, Part], dropped: Collection[int]) -> dict[str, Part]:
    """What belongs to a model without some of its layers, under the names that it has there."""
    kept = {}
    for name, part in named_parts.items():
        path = name.split(".")
        if path[0] == "layers" and path[1].isdecimal():
            layer = int(path[1])
            if layer in dropped:
                continue
            path[1] = str(layer - sum(other < layer for other in dropped))
        kept[".".join(path)] = part
    return kept


def read_adapter(folder: Path) -> tuple[lora.LoraConfig, dict[str, lora.Pair]]:
    """The options of an adapter in PEFT's form, and the (A, B) of each layer."""
    file = folder / ADAPTER_WEIGHTS
    if not named(file):
        raise UserError(
            f"{folder} has no {file.name}; adapters are read from safetensors files only"
        )
    found = {}
    with open_tensors(file) as tensors:
        for key in tensors.keys():
            tensor = read_tensor(tensors, file, key)
            # "default" is what PEFT calls an adapter that was given no name.
            name = WRAPPERS.sub("", key).removeprefix("module.")
            name = name.replace(".default.weight", ".weight")
            if name in found:
                raise UserError(
                    f"{file}: {key} and another tensor are both {name}; keep the one that is meant"
                )
            found[name] = tensor
    return lora.from_peft(read_json(folder / ADAPTER, finite=True), found, folder)


@torch.no_grad()
def load_adapter(model: Transformer, folder: Path) -> Transformer:
    """Copy an adapter in PEFT's form into a model that was adapted alike. Returns the model."""
    config, pairs = read_adapter(folder)
    layers = lora.adapters(model)
    scales = {layer.scale for layer in layers.values()}
    if pairs.keys() != layers.keys() or scales != {config.scale}:
        raise UserError(f"{folder}: an adapter of other layers or another scale than this run's")
    for name, pair in pairs.items():
        layer = layers[name]
        _check_pair(name, pair, layer.weight, folder)
        sharding.fill(layer.lora_A.weight, pair[0])
        sharding.fill(layer.lora_B.weight, pair[1])
    return model


def _check_pair(name: str, pair: lora.Pair, weight: Tensor, folder: Path) -> None:
    a, b = pair
    found, (rows, columns) = (len(b), a.shape[1]), weight.shape
    if found != (rows, columns):
        raise UserError(
            f"{folder}: the adapter of {name} is for a layer of {found[0]} x {found[1]}, "
            f"not {rows} x {columns}"
        )


# --- saving -------------------------------------------------------------------------------


def save_model(
    model: Transformer,
    folder: Path,
    tokenizer: Any,
    stop_ids: Sequence[int],
    sampling: Json | None = None,
) -> None:
    """Write what `transformers` and vLLM load: weights, both configs, tokenizer files.

    The weights of an adapted model are merged; the adapter itself goes to `adapter/`, as PEFT loads
    it. generation_config.json has every stop id. `tokenizer.save(folder)` writes its own files.

    Args:
        sampling: The settings of `transformers` with which the model was sampled in training: those
            who load it sample so by default. None: it was not, and the default is greedy.
    """
    folder = Path(folder)
    keys = {}
    for name, _ in model.named_parameters():
        if ".lora_" not in name:
            keys[name] = name if name.startswith("lm_head") else f"model.{name}"
    shapes = {key: list(model.get_parameter(name).shape) for name, key in keys.items()}
    dtype = lora.merged_dtype(model)
    if lora.adapters(model):
        save_adapter(model, folder / "adapter")
    values = ((keys[name], p.to(dtype)) for name, p in lora.plain_parameters(model))
    stream_tensors(shapes, dtype, values, folder / SINGLE)
    dtype_name = str(dtype).removeprefix("torch.")
    write_json(folder / "config.json", config_to_hf(model.config, stop_ids[0], dtype_name))
    generation_config = {
        "eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0],
        "pad_token_id": stop_ids[-1],
        "do_sample": sampling is not None,
        "repetition_penalty": 1.0,
    }
    write_json(folder / "generation_config.json", generation_config | (sampling or {}))
    tokenizer.save(folder)


def save_adapter(model: Transformer, folder: Path) -> None:
    """Write the two files of an adapter in PEFT's form to a new folder."""
    folder.mkdir()
    settings, tensors = lora.to_peft(model)
    write_json(folder / ADAPTER, settings)
    save_tensors(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
