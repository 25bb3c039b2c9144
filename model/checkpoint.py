"""Hugging Face checkpoints <-> ours. Only safetensors and JSON are read or written; nothing is ever unpickled."""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from errors import UserError
from model.transformer import PRESETS, Transformer, config_from_hf, config_to_hf

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def locate(name, option):
    """A preset's name stays a name (returns None); a folder or a hub id becomes a folder. `option` is named in errors."""
    if name in PRESETS:
        return None
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{option} {name}: the folder has no config.json")
        return folder
    if HUB_ID.fullmatch(name) and not folder.exists() and name.split("/")[0] not in ("runs", "checkpoints"):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))
        except Exception as e:
            raise UserError(f"{option} {name}: neither a folder nor a model that the hub gives ({type(e).__name__})") from None
    raise UserError(f"{option} {name}: no such folder; presets are {', '.join(PRESETS)}")


def read_config(name, folder):
    """The ModelConfig of a preset (folder None) or of a checkpoint folder."""
    return PRESETS[name] if folder is None else config_from_hf(read_json(folder / "config.json"), folder)


def stop_ids_of(folder):
    """The end-of-sequence ids that a checkpoint's generation_config.json names."""
    path = folder and folder / "generation_config.json"
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
    """Copy a checkpoint (one safetensors file or an index of shards) into the model, casting to the model's dtype."""
    wanted = dict(model.named_parameters())
    found = set()
    for file in _weight_files(folder):
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
                    wanted[name].copy_(tensor)
                    found.add(name)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: damaged or unreadable safetensors file ({str(e).splitlines()[0]})") from None
    missing = sorted(set(wanted) - found)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{folder}: tensor {missing[0]}{more} is missing; the checkpoint is incomplete")
    return model


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
    """What `transformers` and vLLM load: weights, config, tokenizer files, generation_config with every stop id."""
    folder = Path(folder)
    tensors = {n if n.startswith("lm_head") else f"model.{n}": p.detach().cpu().contiguous() for n, p in model.named_parameters()}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config_to_hf(model.config, stop_ids[0], dtype))
    eos = {"eos_token_id": stop_ids if len(stop_ids) > 1 else stop_ids[0]}
    write_json(folder / "generation_config.json", eos | {"pad_token_id": stop_ids[-1], "do_sample": False})
    tokenizer.save(folder)


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")
