"""The config.json of Hugging Face checkpoints, from and to `ModelConfig`."""

import math
from pathlib import Path
from typing import Any

from errors import UserError
from model.transformer import ModelConfig

_KINDS = {
    int: "a whole number above 0",
    float: "a number above 0",
    bool: "true or false",
    str: "a string",
    list: "a list",
    dict: "an object",
}


def config_from_hf(hf: dict[str, Any], source: Path | str) -> ModelConfig:
    """The ModelConfig of a checkpoint's config.json.

    A null counts as a value that is not set. What would be computed wrongly is refused with a
    UserError, which begins with `source`.
    """
    hf = _without_nulls(hf)

    def refuse(text: str) -> None:
        raise UserError(f"{source}: {text} is not supported")

    def value(name: str, kind: type, default: Any = None) -> Any:
        found = hf.get(name, default)
        if found is None:
            raise UserError(f"{source}: config.json has no {name!r}")
        return _checked(found, name, kind, source)

    family = hf.get("model_type")
    if family not in ("qwen2", "qwen3"):
        refuse(f"model_type {family!r} (qwen2 and qwen3 are)")
    # 4096 is what `transformers` takes where the key is missing.
    if hf.get("use_sliding_window") and value("sliding_window", float, 4096):
        refuse("sliding-window attention")
    layer_types = {str(kind) for kind in value("layer_types", list, [])} - {"full_attention"}
    if layer_types:
        refuse(f"layer_types {', '.join(sorted(layer_types))}")
    quantization = hf.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        refuse(f"a quantised checkpoint ({method})")
    if value("hidden_act", str, "silu") != "silu":
        refuse(f"hidden_act {hf['hidden_act']!r}")

    hidden, heads = value("hidden_size", int), value("num_attention_heads", int)
    kv_heads = value("num_key_value_heads", int, heads)
    head_dim = value("head_dim", int, 128 if family == "qwen3" else hidden // heads)
    if heads % kv_heads:
        refuse(
            f"num_key_value_heads {kv_heads}, which does not divide num_attention_heads {heads},"
        )
    if head_dim % 2:
        refuse(f"head_dim {head_dim}, which is odd,")
    return ModelConfig(
        vocab_size=value("vocab_size", int),
        hidden_size=hidden,
        intermediate_size=value("intermediate_size", int),
        num_layers=value("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=value("tie_word_embeddings", bool, False),
        qkv_bias=family == "qwen2" or value("attention_bias", bool, False),
        qk_norm=family == "qwen3",
        rope_theta=_rope_theta(hf, source),
        rms_norm_eps=value("rms_norm_eps", float, 1e-6),
        max_position_embeddings=value("max_position_embeddings", int, 32768),
    )


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _checked(value: Any, name: str, kind: type, source: Path | str) -> Any:
    """`value` as a `kind` of `_KINDS`. Raises UserError for anything else."""
    if kind in (int, float):
        fits = type(value) in (int, float) and 0 < value < math.inf and kind(value) == value
    else:
        fits = isinstance(value, kind)
    if not fits:
        raise UserError(
            f"{source}: config.json has {name} {value!r:.60}, which is not {_KINDS[kind]}"
        )
    return kind(value)


def _rope_theta(hf: dict[str, Any], source: Path | str) -> float:
    """The base of the rotary frequencies, wherever a version of `transformers` wrote it.

    Version 4 has it at the top level, version 5 in rope_parameters, there for all layers or by the
    type of layer. Raises UserError for scaled frequencies, and where two places differ.
    """
    default = _checked(hf.get("rope_theta", 10000.0), "rope_theta", float, source)
    factors = [hf.get("partial_rotary_factor", 1)]
    thetas = []
    for name in ("rope_scaling", "rope_parameters"):
        settings = _without_nulls(_checked(hf.get(name, {}), name, dict, source))
        all_layers = _checked(settings.pop("full_attention", {}), name, dict, source)
        settings |= _without_nulls(all_layers)
        other = [key for key, value in settings.items() if isinstance(value, dict)]
        if other:
            raise UserError(f"{source}: {name} of {', '.join(other)} is not supported")
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default":
            raise UserError(f"{source}: rope scaling {kind!r} is not supported")
        factors.append(settings.get("partial_rotary_factor", 1))
        if settings:
            theta = settings.get("rope_theta", default)
            thetas.append(_checked(theta, "rope_theta", float, source))
    for factor in factors:
        if factor != 1:
            raise UserError(
                f"{source}: rope scaling with partial_rotary_factor {factor} is not supported"
            )
    if len(set(thetas)) > 1:
        raise UserError(
            f"{source}: rope_scaling and rope_parameters have different rope_theta "
            f"({thetas[0]:g}, {thetas[1]:g}); keep one of them"
        )
    return thetas[0] if thetas else default


def config_to_hf(config: ModelConfig, eos_token_id: int | None, dtype: str) -> dict[str, Any]:
    """The config.json that `transformers` and vLLM read."""
    return {
        "architectures": ["Qwen3ForCausalLM" if config.qk_norm else "Qwen2ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention_bias": config.qkv_bias and config.qk_norm,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }
