"""Hugging Face checkpoints and PEFT adapters <-> ours. Only safetensors and JSON are read or written; nothing is ever unpickled."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from errors import UserError
from model import lora
from model.transformer import PRESETS, Transformer, config_from_hf, config_to_hf

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ADAPTER = "adapter_config.json"  # a folder that holds it is a PEFT adapter, loaded merged into its base


def locate(name, option):
    """A preset's name stays a name (returns None); a folder or a hub id becomes a folder, of a checkpoint or of a PEFT adapter whose base is
    there too. `option` is named in errors."""
    if name in PRESETS:
        return None
    folder = Path(name)
    if folder.is_dir():
        if not (base_of(folder) / "config.json").is_file():
            raise UserError(f"{option} {name}: the folder has no config.json")
        return folder
    if HUB_ID.fullmatch(name) and not folder.exists() and name.split("/")[0] not in ("runs", "checkpoints"):
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))
        except Exception as e:
            raise UserError(f"{option} {name}: neither a folder nor a model that the hub gives ({type(e).__name__})") from None
        base_of(folder)  # refuses an adapter that cannot be used
        return folder
    raise UserError(f"{option} {name}: no such folder; presets are {', '.join(PRESETS)}")


def base_of(folder):
    """The folder of the base that a PEFT adapter names (if it is not there: of the base that lies beside the adapter); a checkpoint's own."""
    file = folder / ADAPTER
    if not file.is_file():
        return folder
    settings = read_json(file)
    lora.check_peft(settings, file)
    name = settings.get("base_model_name_or_path") or ""
    if (folder / "config.json").is_file() and not (name and Path(name).is_dir()):
        return folder
    if not name:
        raise UserError(f"{file}: no base_model_name_or_path; name the base's folder there, or put its config.json and weights beside it")
    base = locate(name, f"{file}: base_model_name_or_path")
    if base is None or (base / ADAPTER).is_file():
        raise UserError(f"{file}: base_model_name_or_path {name} is {'an adapter itself' if base else 'a preset'}; name the folder of a whole model")
    return base


def tokenizer_folder(folder):
    """Where a checkpoint's tokenizer is: an adapter often leaves it to its base."""
    return folder if (folder / "tokenizer.json").is_file() else base_of(folder)


def read_config(name, folder):
    """The ModelConfig of a preset (folder None) or of a checkpoint folder."""
    return PRESETS[name] if folder is None else config_from_hf(read_json(base_of(folder) / "config.json"), folder)


def stop_ids_of(folder):
    """The end-of-sequence ids that a checkpoint's generation_config.json names."""
    path = folder and base_of(folder) / "generation_config.json"
    ids = read_json(path).get("eos_token_id", []) if path and path.is_file() else []
    return ids if isinstance(ids, list) else [ids]


def build_model(config, folder, *, device, seed, weight_dtype=torch.float32, compute_dtype=None):
    """A Transformer on `device`: the folder's weights, or random ones from `seed` (folder None)."""
    with torch.device("meta"):
        model = Transformer(config, compute_dtype)
    model = model.to(weight_dtype).to_empty(device=device)
    return model.init_weights(seed) if folder is None else load_weights(model, folder)


@torch.no_grad()
def load_weights(model, folder):
    """Copy a checkpoint (one safetensors file or an index of shards, with or without an adapter) into the model, casting to its dtype."""
    wanted = dict(model.named_parameters())
    found = set()
    config, pairs = read_adapter(folder) if (folder / ADAPTER).is_file() else (None, {})
    if strange := next((layer for layer in pairs if f"{layer}.weight" not in wanted), None):
        raise UserError(f"{folder}: the adapter has a layer {strange} that its base has not")
    for file in _weight_files(base_of(folder)):
        try:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for key in tensors.keys():
                    name = key.removeprefix("model.")
                    if name.endswith("rotary_emb.inv_freq"):
                        continue
                    if name == "lm_head.weight" and model.config.tie_word_embeddings:
                        continue  # some tied checkpoints store the head a second time
                    if name not in wanted:
                        raise UserError(f"{file}: unexpected tensor {key}; config.json does not describe these weights")
                    tensor = tensors.get_tensor(key)
                    if tensor.shape != wanted[name].shape:
                        raise UserError(f"{file}: {key} has shape {list(tensor.shape)}, config.json asks for {list(wanted[name].shape)}")
                    if pair := pairs.get(name.removesuffix(".weight")):
                        _check_pair(name, pair, tensor.shape, folder)
                        tensor = lora.merge(tensor, *pair, config.scale)
                    wanted[name].copy_(tensor)
                    found.add(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: damaged or unreadable safetensors file ({str(e).splitlines()[0]})") from None
    missing = sorted(set(wanted) - found)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {missing[0]}{more} is missing; the checkpoint is incomplete")
    return model


def read_adapter(folder):
    """(LoraConfig, {name of the layer: (A, B)}) of a folder in PEFT's form."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(f"{folder} has no {file.name}; adapters are read from safetensors files only")
    try:
        return lora.from_peft(read_json(folder / ADAPTER), load_file(file), folder)
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: damaged or unreadable safetensors file ({str(e).splitlines()[0]})") from None


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
        raise UserError(f"{folder}: the adapter of {name} is for a layer of {pair[1].shape[0]} x {pair[0].shape[1]}, not {shape[0]} x {shape[1]}")


def _weight_files(folder):
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({folder / f for f in read_json(index).get("weight_map", {}).values()})
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(f"{folder} has no {file.name}; weights are read from safetensors files only")
    return files


def read_json(path):
    try:
        value = json.loads(path.read_text())
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def save_model(model, folder, tokenizer, stop_ids):
    """What `transformers` and vLLM load: weights, config, tokenizer files, generation_config with every stop id. Of an adapted model the weights
    are merged, and the adapter itself is in `adapter/`, as PEFT loads it."""
    folder = Path(folder)
    tensors = {n if n.startswith("lm_head") else f"model.{n}": p.detach().cpu().contiguous() for n, p in lora.merged_parameters(model)}
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if lora.adapters(model):
        save_adapter(model, folder / "adapter")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_to_hf(model.config, stop_ids[0], dtype))
    eos = {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    write_json(folder / "generation_config.json", eos | {"pad_token_id": stop_ids[-1], "do_sample": False})
    tokenizer.save(folder)


def save_adapter(model, folder):
    """The two files of PEFT's form."""
    folder.mkdir()
    settings, tensors = lora.to_peft(model)
    write_json(folder / ADAPTER, settings)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")
