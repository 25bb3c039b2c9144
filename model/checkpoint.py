"""Hugging Face checkpoints and PEFT adapters <-> ours. Only safetensors and JSON are read or written; nothing is ever unpickled."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import UserError, say
from files import HEAD, explain, named, read_json, reason, unreadable, write_json
from model import lora, parallel
from model.hf import config_from_hf, config_to_hf
from model.transformer import PRESETS, Transformer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SINGLE, INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
)  # the weights of a checkpoint, in one file or in several
ADAPTER = (
    "adapter_config.json"  # a folder that holds it is a PEFT adapter, loaded merged into its base
)


def locate(name, option):
    """A preset's name stays a name (returns None); a folder or a hub id becomes a folder, of a checkpoint or of a PEFT adapter whose base is
    there too. `option` is named in errors."""
    if name in PRESETS:
        return None
    folder = Path(name)
    if folder.is_dir():
        if not named(base_of(folder) / "config.json"):
            raise UserError(f"{option} {name}: the folder has no config.json")
        return folder
    if (
        HUB_ID.fullmatch(name)
        and not folder.exists()
        and name.split("/")[0] not in ("runs", "checkpoints")
    ):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(
                    name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]
                )
            )
        except Exception as e:
            raise UserError(
                f"{option} {name}: neither a folder nor a model that the hub gives ({type(e).__name__})"
            ) from None
        base_of(folder)  # refuses an adapter that cannot be used
        return folder
    raise UserError(f"{option} {name}: no such folder; presets are {', '.join(PRESETS)}")


def base_of(folder):
    """The folder of the base that a PEFT adapter names, or of the base that lies beside it where it names none; a checkpoint's own.

    Raises UserError where an adapter names a base that is not here and a whole model lies beside it: that may be the base, or what
    came of merging the adapter into it, and merging twice would be a model that nobody trained.
    """
    file = folder / ADAPTER
    if not named(file):
        return folder
    settings = read_json(file, finite=True)
    lora.check_peft(settings, file)
    name = settings.get("base_model_name_or_path") or ""
    has_config, here = (folder / "config.json").is_file(), bool(name) and Path(name).is_dir()
    if has_config and (not name or here and Path(name).samefile(folder)):
        return folder
    if has_config and not here and any(named(folder / weights) for weights in (SINGLE, INDEX)):
        raise UserError(
            f"{file} names the base {name}, which is no folder here, and a whole model lies beside it: delete {ADAPTER} if the adapter "
            'is merged into that model, or make base_model_name_or_path "" if it is the base without it'
        )
    if not name:
        raise UserError(
            f"{file}: no base_model_name_or_path; name the base's folder there, or put its config.json and weights beside it"
        )
    base = locate(name, f"{file}: base_model_name_or_path")
    if base is None or (base / ADAPTER).is_file():
        raise UserError(
            f"{file}: base_model_name_or_path {name} is {'an adapter itself' if base else 'a preset'}; name the folder of a whole model"
        )
    return base


def tokenizer_folder(folder):
    """Where a checkpoint's tokenizer is: an adapter often leaves it to its base."""
    return folder if named(folder / "tokenizer.json") else base_of(folder)


def read_config(name, folder):
    """The ModelConfig of a preset (folder None) or of a checkpoint folder. One that says tied of weights that hold another head
    is that of an untied model: the head that is there counts, as it does for `transformers`."""
    if folder is None:
        return PRESETS[name]
    base = base_of(folder)
    config = config_from_hf(read_json(base / "config.json", finite=True), folder)
    stored = stored_tensors(
        base
    )  # headers only: a file that is missing or no weights at all is found before anything is loaded
    if config.tie_word_embeddings and has_own_head(base, stored):
        config = dataclasses.replace(config, tie_word_embeddings=False)
    return config


def stop_ids_of(folder):
    """The end-of-sequence ids that a checkpoint's generation_config.json names."""
    path = folder and base_of(folder) / "generation_config.json"
    if not path or not named(path):
        return []
    value = read_json(path, finite=True).get("eos_token_id")
    ids = [i for i in (value if isinstance(value, list) else [value]) if i is not None]
    if strange := next((i for i in ids if type(i) is not int), None):
        raise UserError(f"{path}: eos_token_id {strange!r} is not a token's id")
    return ids


def build_model(config, folder, *, device, seed, weight_dtype=torch.float32, compute_dtype=None):
    """A Transformer on `device`: the folder's weights, or random ones from `seed` (folder None)."""
    with torch.device("meta"):
        model = Transformer(config, compute_dtype)
    model = model.to(weight_dtype).to_empty(device=device)
    return model.init_weights(seed) if folder is None else load_weights(model, folder)


# --- weights -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[safe_open]:
    """A safetensors file, opened for reading. Raises UserError that says what it is instead, inside `with` too."""
    if wrong := unreadable(file):
        raise UserError(f"{file} {wrong}")
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as e:
        with contextlib.suppress(OSError), open(file, "rb") as f:
            if wrong := explain(f.read(HEAD), "safetensors"):
                raise UserError(f"{file}: damaged or not a safetensors file: it {wrong}") from None
        raise UserError(f"{file}: damaged or unreadable safetensors file ({reason(e)})") from None


# What savers leave in front of a tensor's name, or within it, and what does not change what the tensor is: torch.compile,
# DataParallel, FSDP and activation checkpointing wrap modules; PEFT wraps a model, and merging leaves the wrapper's name.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
PREFIXES = ("module.", "base_model.", "model.")
UNMERGED = ("lora_", ".base_layer.", "modules_to_save.", ".original_module.")


def our_name(key: str) -> str:
    """The name that we give a tensor of a checkpoint: without what savers put before it."""
    name = WRAPPERS.sub("", key)
    while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
        name = name.removeprefix(prefix)
    return name


class Stored(NamedTuple):
    """Where a tensor of a checkpoint is: under which name in which file."""

    file: Path
    key: str


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """{our name: where it is} of a checkpoint folder's weights. Reads the files' headers only.

    Raises UserError for files that are missing or not safetensors, for an index that does not fit them, where a tensor is in two of
    the files that an index names (shards of two savings, mixed up), and where two tensors would get one name."""
    files, listed = _weight_files(folder)
    keys_of, file_of, found = {}, {}, {}
    for file in files:
        with open_tensors(file) as tensors:
            keys_of[file] = list(tensors.keys())
        for key in keys_of[file]:
            if other := file_of.get(key):
                raise UserError(
                    f"{folder}: tensor {key} is in two files, {other.name} and {file.name}; download or save the checkpoint again"
                )
            file_of[key] = file
    for file, keys in keys_of.items():
        for key in keys:
            name = our_name(key)
            if name.endswith("rotary_emb.inv_freq"):
                continue  # computed
            if part := next((part for part in UNMERGED if part in key), None):
                raise UserError(
                    f"{file}: tensor {key} belongs to an adapter that is not merged ({part.strip('._')}); merge it with PEFT"
                )
            if name in found:
                raise UserError(
                    f"{folder}: {found[name].key} and {key} are both {name}; keep the one that is meant"
                )
            found[name] = Stored(file, key)
        if lacking := sorted(
            key for key, where in listed.items() if where == file and key not in keys
        ):
            raise UserError(
                f"{file} has no tensor {lacking[0]}, which the index says is there; the download is incomplete or mixed up"
            )
    return found


def _weight_files(folder):
    """(files, {tensor: file} as the index says, or {}): one file, or shards. Where both are there the single file counts, as it does
    for `transformers`; files that no index names are left alone."""
    single, index = folder / SINGLE, folder / INDEX
    if named(single) or not named(index):
        if wrong := unreadable(single):
            if wrong != "is not there":
                raise UserError(f"{single} {wrong}")
            raise UserError(f"{folder} has no {single.name}; {_instead(folder)}")
        return [single], {}
    listed = {}
    weight_map = read_json(index, finite=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index}: weight_map must name the file of every tensor, found {weight_map!r:.40}"
        )
    for key, name in weight_map.items():
        if (
            not isinstance(name, str)
            or name != PurePosixPath(name).name
            or not name.endswith(".safetensors")
        ):
            raise UserError(
                f"{index}: the file of {key} is {name!r:.80}; it must be a .safetensors file of this folder"
            )
        listed[key] = folder / name
    files = sorted(set(listed.values()))
    for file in files:
        if wrong := unreadable(file):
            raise UserError(
                f"{folder} has no {file.name}, which the index names; the download is incomplete"
                if wrong == "is not there"
                else f"{file} {wrong}"
            )
    return files, listed


def _instead(folder):
    """What a folder without model.safetensors has, and what to do about it."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        return f"it has {shards[0].name}, but model.safetensors.index.json, which says what is where, is missing"
    other = next(
        (
            f
            for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
            for f in sorted(folder.glob(pattern))
        ),
        None,
    )
    return f"weights are read from safetensors files only{f', and it has {other.name}; save them as safetensors' if other else ''}"


def has_own_head(folder: Path, stored: dict[str, Stored]) -> bool:
    """Whether a checkpoint's tensors hold an output head beside the embedding, with other values. Says so once, on rank 0."""
    embedding, head = stored.get("embed_tokens.weight"), stored.get("lm_head.weight")
    if embedding is None or head is None:
        return False
    with open_tensors(embedding.file) as a, open_tensors(head.file) as b:
        one, other = a.get_tensor(embedding.key), b.get_tensor(head.key)
    _check_float(embedding.file, embedding.key, one)
    _check_float(head.file, head.key, other)
    if one.shape == other.shape:
        wide = torch.promote_types(one.dtype, other.dtype)
        if torch.equal(one.to(wide), other.to(wide)):
            return False
    if parallel.speaks() and str(folder) not in _told:
        _told.add(str(folder))
        say(
            f"{folder}: config.json says tied, but the weights hold another {head.key}: it is used, and the model is untied"
        )
    return True


_told = set()  # folders of which that was said


def _check_float(file, key, tensor):
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(
            f"{file}: {key} is {kind}: quantised weights are not supported; name a checkpoint in bf16, fp16 or fp32"
        )


FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def load_weights(model, folder):
    """Copy a checkpoint (one safetensors file or an index of shards, with or without an adapter) into the model, casting to its dtype."""
    wanted = dict(model.named_parameters())
    config, pairs = read_adapter(folder) if (folder / ADAPTER).is_file() else (None, {})
    if strange := next((layer for layer in pairs if f"{layer}.weight" not in wanted), None):
        raise UserError(f"{folder}: the adapter has a layer {strange} that its base has not")
    stored = stored_tensors(base_of(folder))
    if model.config.tie_word_embeddings and "lm_head.weight" in stored:
        # some tied checkpoints store the head a second time, and some only under the head's name
        head = stored.pop("lm_head.weight")
        stored.setdefault("embed_tokens.weight", head)
    by_file = {}
    for name, (file, key) in stored.items():
        by_file.setdefault(file, []).append((name, key))
    for file, names in by_file.items():
        with open_tensors(file) as tensors:
            for name, key in names:
                if name not in wanted:
                    raise UserError(
                        f"{file}: unexpected tensor {key}; config.json does not describe these weights"
                    )
                tensor = tensors.get_tensor(key)
                _check_float(file, key, tensor)
                if tensor.shape != wanted[name].shape:
                    raise UserError(
                        f"{file}: {key} has shape {list(tensor.shape)}, config.json asks for {list(wanted[name].shape)}"
                    )
                if pair := pairs.get(name.removesuffix(".weight")):
                    _check_pair(name, pair, tensor.shape, folder)
                    tensor = lora.merge(tensor, *pair, config.scale)
                wanted[name].copy_(tensor)
    missing = sorted(set(wanted) - set(stored))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        tied = (
            "; config.json says that the head is not tied" if missing == ["lm_head.weight"] else ""
        )
        raise UserError(
            f"{folder}: tensor {missing[0]}{more} is missing; the checkpoint is incomplete{tied}"
        )
    return model


def read_adapter(folder):
    """(LoraConfig, {name of the layer: (A, B)}) of a folder in PEFT's form."""
    file = folder / "adapter_model.safetensors"
    if not named(file):
        raise UserError(
            f"{folder} has no {file.name}; adapters are read from safetensors files only"
        )
    with open_tensors(file) as tensors:
        found = {}
        for key in tensors.keys():
            tensor = tensors.get_tensor(key)
            _check_float(file, key, tensor)
            name = (
                WRAPPERS.sub("", key).removeprefix("module.").replace(".default.weight", ".weight")
            )  # PEFT's name of the adapter
            if name in found:
                raise UserError(
                    f"{file}: {key} and another tensor are both {name}; keep the one that is meant"
                )
            found[name] = tensor
    return lora.from_peft(read_json(folder / ADAPTER, finite=True), found, folder)


@torch.no_grad()
def load_adapter(model, folder):
    """Copy an adapter in PEFT's form into a model that was adapted alike, without merging it."""
    config, pairs = read_adapter(folder)
    layers = lora.adapters(model)
    if pairs.keys() != layers.keys() or config.scale != model.lora.scale:
        raise UserError(f"{folder}: an adapter of other layers or another scale than this run's")
    for name, (a, b) in pairs.items():
        _check_pair(name, (a, b), layers[name].weight.shape, folder)
        layers[name].lora_A.weight.copy_(a)
        layers[name].lora_B.weight.copy_(b)
    return model


def _check_pair(name, pair, shape, folder):
    if (pair[1].shape[0], pair[0].shape[1]) != tuple(shape):
        raise UserError(
            f"{folder}: the adapter of {name} is for a layer of {pair[1].shape[0]} x {pair[0].shape[1]}, not {shape[0]} x {shape[1]}"
        )


# --- saving ------------------------------------------------------------------------------------------------------------


def save_tensors(
    tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file that may be read by whom the umask says: the library makes them for their owner alone."""
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def save_model(model, folder, tokenizer, stop_ids):
    """What `transformers` and vLLM load: weights, config, tokenizer files, generation_config with every stop id. Of an adapted model the weights
    are merged, and the adapter itself is in `adapter/`, as PEFT loads it."""
    folder = Path(folder)
    tensors = {
        n if n.startswith("lm_head") else f"model.{n}": p.detach().cpu().contiguous()
        for n, p in lora.merged_parameters(model)
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if lora.adapters(model):
        save_adapter(model, folder / "adapter")
    save_tensors(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_to_hf(model.config, stop_ids[0], dtype))
    eos = {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    write_json(
        folder / "generation_config.json", eos | {"pad_token_id": stop_ids[-1], "do_sample": False}
    )
    tokenizer.save(folder)


def save_adapter(model, folder):
    """The two files of PEFT's form."""
    folder.mkdir()
    settings, tensors = lora.to_peft(model)
    write_json(folder / ADAPTER, settings)
    save_tensors(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
