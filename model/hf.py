"""The config.json of Hugging Face checkpoints, from and to `ModelConfig`."""

from pathlib import Path

from errors import UserError
from files import Fields, Json, without
from kernels.elementwise import ACTIVATIONS
from model.transformer import ModelConfig, RopeScaling

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# Attention over all tokens, or through a window: keys of layer_types and of rope_parameters.
FULL, WINDOWED = "full_attention", "sliding_attention"
# What a family may have in its config.json and would be computed wrongly here.
_UNSUPPORTED = {
    "qwen2": (),
    "qwen3": (),
    "llama": ("attention_bias", "mlp_bias"),
    "gemma3_text": (
        "attention_bias",
        "final_logit_softcapping",
        "attn_logit_softcapping",
        "use_bidirectional_attention",
    ),
}


MOST = 1 << 24  # of any size: larger ones are damage, and shapes of models would not fit a number
LAYERS = 1000  # at most; each takes time before weights are read
POSITIVE = 1e-30  # what counts as above 0


# --- reading ------------------------------------------------------------------------------


def config_from_hf(hf: Json, source: Path | str) -> ModelConfig:
    """The ModelConfig of a checkpoint's config.json.

    A null counts as a value that is not set. What would be computed wrongly is refused with a
    UserError, which begins with `source`.
    """
    settings = Fields(hf, f"{source}: config.json")
    family = str(settings.values.get("model_type"))
    if family not in ARCHITECTURES:
        settings.refuse(f"model_type {family!r} ({', '.join(ARCHITECTURES)} are)")
    _refuse_other_kinds(settings, family)
    is_gemma = family == "gemma3_text"
    hidden, heads = _size(settings, "hidden_size"), _size(settings, "num_attention_heads")
    kv_heads = _size(settings, "num_key_value_heads", heads)
    usual_head_dim = {"qwen3": 128, "gemma3_text": 256}.get(family, hidden // heads)
    head_dim = _size(settings, "head_dim", usual_head_dim)
    if heads % kv_heads:
        settings.refuse(
            f"num_key_value_heads {kv_heads}, which does not divide num_attention_heads {heads},"
        )
    if head_dim % 2:
        settings.refuse(f"head_dim {head_dim}, which is odd,")
    if is_gemma and (scalar := _number(settings, "query_pre_attn_scalar", 256)) != head_dim:
        settings.refuse(f"query_pre_attn_scalar {scalar:g} with head_dim {head_dim}")
    activation = settings.get("hidden_act", str, "silu")
    if is_gemma:
        activation = settings.get("hidden_activation", str, "gelu_pytorch_tanh")
    if activation not in ACTIVATIONS:
        settings.refuse(f"hidden_act {activation!r}")
    layers = settings.get("num_hidden_layers", int, least=1, most=LAYERS)
    theta, scaling = _rope(settings, FULL, 1e6 if is_gemma else 1e4)
    windows, window_theta = (), ModelConfig.window_rope_theta
    if is_gemma:
        windows = _windows(settings, layers)
        window_theta, window_scaling = _rope(settings, WINDOWED, 1e4)
        if window_scaling:
            settings.refuse(f"rope scaling of {WINDOWED}")
    return ModelConfig(
        vocab_size=_size(settings, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(settings, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=settings.get("tie_word_embeddings", bool, is_gemma),
        qkv_bias=family == "qwen2" or settings.get("attention_bias", bool, False),
        qk_norm=family == "qwen3" or is_gemma,
        rope_theta=theta,
        rms_norm_eps=_number(settings, "rms_norm_eps", 1e-6),
        max_position_embeddings=_size(settings, "max_position_embeddings", 32768, 1 << 40),
        rope_scaling=scaling,
        windows=windows,
        window_rope_theta=window_theta,
        activation=activation,
        sandwich_norms=is_gemma,
        norm_offset=1.0 if is_gemma else 0.0,
        scale_embedding=is_gemma,
    )


def _size(settings: Fields, name: str, default: int | None = None, most: int = MOST) -> int:
    return settings.get(name, int, default, least=1, most=most)


def _number(settings: Fields, name: str, default: float | None = None) -> float:
    return settings.get(name, float, default, least=POSITIVE)


def _refuse_other_kinds(settings: Fields, family: str) -> None:
    """Raise UserError for what is no part of the family's models as they are built here."""
    if family != "gemma3_text":
        # 4096 is what `transformers` takes where the key is missing.
        has_window = settings.values.get("use_sliding_window")
        if has_window and _number(settings, "sliding_window", 4096):
            settings.refuse("sliding-window attention")
        layer_types = {str(kind) for kind in settings.get("layer_types", list, [])} - {FULL}
        if layer_types:
            settings.refuse(f"layer_types {', '.join(sorted(layer_types))}")
    quantization = settings.values.get("quantization_config")
    if quantization:
        method = quantization
        if isinstance(quantization, dict):
            method = quantization.get("quant_method")
        settings.refuse(f"a quantised checkpoint ({method})")
    for name in _UNSUPPORTED[family]:
        if value := settings.values.get(name):
            settings.refuse(f"{name} {value!r:.60}")


def _windows(settings: Fields, layers: int) -> tuple[int, ...]:
    """Each layer's window, 0 where it sees all tokens, as the layers' types or a pattern say."""
    window = _size(settings, "sliding_window", 4096)
    pattern = _size(settings, "sliding_window_pattern", 6)
    kinds = [WINDOWED if (layer + 1) % pattern else FULL for layer in range(layers)]
    kinds = settings.get("layer_types", list, kinds)
    if others := {str(kind) for kind in kinds} - {FULL, WINDOWED}:
        settings.refuse(f"layer_types {', '.join(sorted(others))}")
    if len(kinds) != layers:
        settings.refuse(f"{len(kinds)} layer_types with num_hidden_layers {layers}")
    return tuple(window if kind == WINDOWED else 0 for kind in kinds)


def _rope(settings: Fields, kind: str, usual: float) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies and their scaling, in layers of a kind.

    Version 4 of `transformers` has them in rope_theta (rope_local_base_freq for layers with a
    window) and rope_scaling, version 5 in rope_parameters, there for all layers or by the kind of
    layer. Raises UserError for other scalings than two, and where two places differ.
    """
    by_kind = kind == WINDOWED
    is_gemma = settings.values["model_type"] == "gemma3_text"
    top_level = "rope_local_base_freq" if by_kind else "rope_theta"
    usual = _number(settings, top_level, usual)
    factors = [settings.values.get("partial_rotary_factor", 1)]
    found = []
    for name in ("rope_scaling", "rope_parameters"):
        of_all = settings.part(name)
        nested = {key for key, value in of_all.values.items() if isinstance(value, dict)}
        known = {FULL, WINDOWED} if is_gemma else {FULL}
        if unknown := nested - known:
            settings.refuse(f"{name} of {', '.join(sorted(unknown))}")
        rope = of_all.part(kind)
        flat = without(of_all.values, nested)
        if flat and name == "rope_parameters" and is_gemma:
            settings.refuse("rope_parameters for all kinds of layers at once")
        if not by_kind:
            rope.values = flat | rope.values
        factors.append(rope.values.get("partial_rotary_factor", 1))
        if rope.values:
            found.append((_number(rope, "rope_theta", usual), _scaling(rope)))
    for factor in factors:
        if factor != 1:
            settings.refuse(f"rope scaling with partial_rotary_factor {factor}")
    if len(found) == 2 and found[0] != found[1]:
        (theta, scaling), (other_theta, other_scaling) = found
        differ = f"rope_theta ({theta:g}, {other_theta:g})"
        if theta == other_theta:
            differ = f"scalings ({scaling}, {other_scaling})"
        raise UserError(
            f"{settings.where}: rope_scaling and rope_parameters have different {differ}; "
            "keep one of them"
        )
    return found[0] if found else (usual, None)


def _scaling(rope: Fields) -> RopeScaling | None:
    kind = rope.values.get("rope_type", rope.values.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(_number(rope, "factor"))
    if kind != "llama3":
        rope.refuse(f"rope scaling {kind!r}")
    low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
    if low >= high:
        rope.refuse(f"low_freq_factor {low:g} with high_freq_factor {high:g}")
    context = _size(rope, "original_max_position_embeddings", most=1 << 40)
    return RopeScaling(_number(rope, "factor"), context, low, high)


# --- writing ------------------------------------------------------------------------------


def config_to_hf(config: ModelConfig, eos_token_id: int | None, dtype: str) -> Json:
    """The config.json that `transformers` (4 and 5) and vLLM read."""
    rope: Json = {"rope_type": "default"}
    scaling = config.rope_scaling
    if scaling and scaling.context:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low,
            "high_freq_factor": scaling.high,
            "original_max_position_embeddings": scaling.context,
        }
    elif scaling:
        rope = {"rope_type": "linear", "factor": scaling.factor}
    hf = {
        "architectures": [ARCHITECTURES[config.family]],
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
        "rope_scaling": rope if scaling else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.activation,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "eos_token_id": eos_token_id,
        "torch_dtype": dtype,
    }
    return hf | _of_gemma(config, hf["rope_parameters"]) if config.windows else hf


def _of_gemma(config: ModelConfig, rope: Json) -> Json:
    """What the config.json of a model with windows has more, or otherwise."""
    kinds = [WINDOWED if window else FULL for window in config.windows]
    hf = {
        "hidden_activation": config.activation,
        "query_pre_attn_scalar": config.head_dim,
        "sliding_window": max(config.windows) or None,
        "layer_types": kinds,
        "rope_local_base_freq": config.window_rope_theta,
        "rope_parameters": {
            FULL: rope,
            WINDOWED: {"rope_type": "default", "rope_theta": config.window_rope_theta},
        },
    }
    pattern = kinds.index(FULL) + 1 if FULL in kinds else 0
    # Before 4.53, `transformers` knew no layer_types.
    if pattern and kinds == [WINDOWED if (i + 1) % pattern else FULL for i in range(len(kinds))]:
        hf["sliding_window_pattern"] = pattern
    return hf
