"""The Qwen2.5 / Qwen3 transformer. `forward` returns hidden states, never logits: losses take rows and the head.

Parameters carry the names that Hugging Face checkpoints use (without the leading `model.`), so loading is a copy.
Master weights are fp32 on every device; a layer casts its weight to the dtype of its input (no autocast).
Legend: T packed tokens, D hidden, V vocabulary rows, H query heads, K key-value heads, E head dimension, I intermediate.
"""

import dataclasses
import math
import types
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    qk_norm: bool = False
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768

    @property
    def family(self):
        return "qwen3" if self.qk_norm else "qwen2"


def _qwen25(hidden, layers, heads, kv_heads, intermediate, vocab=151936, tie=True):
    return ModelConfig(vocab, hidden, intermediate, layers, heads, kv_heads, hidden // heads, tie)


# Shapes only: a preset's weights are random. Sources: the checkpoints' config.json files.
PRESETS = {
    "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864),
    "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960),
    "qwen2.5-3b": _qwen25(2048, 36, 16, 2, 11008),
    "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944, vocab=152064, tie=False),
    "qwen3-0.6b": ModelConfig(
        151936,
        1024,
        3072,
        28,
        16,
        8,
        128,
        qkv_bias=False,
        qk_norm=True,
        max_position_embeddings=40960,
    ),
    # the embedded task's teacher and student, the student of the study in small, and small bodies under the full vocabulary for benchmarks and tests
    "tiny-teacher": _qwen25(96, 3, 4, 2, 256, vocab=512),
    "tiny": _qwen25(96, 2, 4, 2, 256, vocab=512),
    "mini": _qwen25(48, 2, 4, 2, 128, vocab=512),
    "small-teacher": _qwen25(384, 6, 6, 2, 1024, vocab=152064, tie=False),
    "small": _qwen25(256, 4, 4, 2, 704),
}


class Linear(nn.Linear):
    """Casts its fp32 weight to the input's dtype."""

    def forward(self, x):
        return F.linear(
            x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        )


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in at least fp32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def rope_tables(positions_T, config, dtype):
    """cos and sin as [T, 1, E] (Su et al., arXiv 2104.09864; the half-split layout of the released checkpoints)."""
    wide = torch.promote_types(dtype, torch.float32)
    exponent = (
        torch.arange(0, config.head_dim, 2, device=positions_T.device, dtype=wide) / config.head_dim
    )
    angle_TE = positions_T.to(wide).unsqueeze(1) * config.rope_theta**-exponent
    angle_TE = torch.cat((angle_TE, angle_TE), 1).unsqueeze(1)
    return angle_TE.cos().to(dtype), angle_TE.sin().to(dtype)


def rotate(x_THE, cos, sin):
    first, second = x_THE.chunk(2, -1)
    return x_THE * cos + torch.cat((-second, first), -1) * sin


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = config
        self.shape_q, self.shape_kv = (c.num_heads, c.head_dim), (c.num_kv_heads, c.head_dim)
        self.q_proj = Linear(c.hidden_size, c.num_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else nn.Identity()

    def project(self, x_TD, rope):
        q_THE = rotate(self.q_norm(self.q_proj(x_TD).unflatten(1, self.shape_q)), *rope)
        k_TKE = rotate(self.k_norm(self.k_proj(x_TD).unflatten(1, self.shape_kv)), *rope)
        return q_THE, k_TKE, self.v_proj(x_TD).unflatten(1, self.shape_kv)


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD):
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    """before -> attend -> after: the halves compile, once for all layers; who sees whom is decided outside of them."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def before(self, x_TD, rope):
        return self.self_attn.project(self.input_layernorm(x_TD), rope)

    def after(self, x_TD, o_THE):
        x_TD = x_TD + self.self_attn.o_proj(o_THE.flatten(1))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))

    def forward(self, layer, x_TD, rope, attend):
        return self.after(x_TD, attend(layer, *self.before(x_TD, rope)))

    def compile_halves(self):
        """Shapes may vary (`torch.compile` makes them symbols at the second one it sees). Methods, so that a copy compiles its own weights."""
        torch._dynamo.config.recompile_limit = max(
            32, torch._dynamo.config.recompile_limit
        )  # training, evaluation and generation, several widths
        self.before, self.after = (
            types.MethodType(torch.compile(f), self) for f in (Block.before, Block.after)
        )


class Transformer(nn.Module):
    """tokens_T, positions_T, attend -> hidden_TD after the final norm.

    attend(layer, q_THE, k_TKE, v_TKE) -> o_THE says who sees whom: `kernels.attention.PackedAttention` in training,
    a KV cache in generation. compute_dtype is that of the activations; None keeps the weights' own.
    """

    def __init__(self, config, compute_dtype=None):
        super().__init__()
        self.config, self.compute_dtype, self.activation_checkpointing = (
            config,
            compute_dtype,
            False,
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_VD(self):
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T, positions_T, attend):
        # a tied head brings a dense gradient of the same matrix: on a CPU the few embedded rows are added to it, not [V, D] zeros
        # with them in it (on a GPU that sum would not be deterministic)
        sparse = self.config.tie_word_embeddings and not tokens_T.is_cuda
        x_TD = F.embedding(tokens_T, self.embed_tokens.weight, sparse=sparse)
        x_TD = x_TD.to(self.compute_dtype or x_TD.dtype)
        rope = rope_tables(positions_T, self.config, x_TD.dtype)
        for layer, block in enumerate(self.layers):
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(
                    block, layer, x_TD, rope, attend, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_TD = block(layer, x_TD, rope, attend)
        return self.norm(x_TD)

    @torch.no_grad()
    def init_weights(self, seed):
        """Normal matrices and embeddings, zero biases, unit norms. The deviation is 0.6/√hidden, 0.02 at the 0.5B's 896; the
        two projections into the residual stream are scaled by 1/√(2·layers) (Radford et al. 2019). The same seed gives the
        same weights on every device."""
        std = 0.6 / self.config.hidden_size**0.5
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / (2 * self.config.num_layers) ** 0.5 if residual else std
                p.copy_(torch.randn(p.shape, generator=generator) * scale)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
        return self

    def flops_per_token(self, context):
        """Forward FLOPs of the body (no head) for one token that attends to `context` others on average."""
        matrices = sum(p.numel() for n, p in self.layers.named_parameters() if p.dim() == 2)
        attention = (
            2 * self.config.num_heads * self.config.head_dim * context * self.config.num_layers
        )
        return 2 * (matrices + attention)


def config_from_hf(hf: dict[str, Any], where: Path | str) -> ModelConfig:
    """A checkpoint's config.json (a dict) as ModelConfig. A null is a value that is not set. Raises UserError, which begins with
    `where`, for what would be computed wrongly."""
    hf = {name: value for name, value in hf.items() if value is not None}

    def refuse(what):
        raise UserError(f"{where}: {what} is not supported")

    def value(name, default, kind):
        """A value of config.json of this kind, of which `default` is one; without a default it has to be there."""
        found = hf.get(name, default)
        if found is None:
            raise UserError(f"{where}: config.json has no {name!r}")
        return _checked(found, name, kind, where)

    family = hf.get("model_type")
    if family not in ("qwen2", "qwen3"):
        refuse(f"model_type {family!r} (qwen2 and qwen3 are)")
    if hf.get("use_sliding_window") and value(
        "sliding_window", 4096, "positive"
    ):  # 4096: what `transformers` takes where the key is missing
        refuse("sliding-window attention")
    layer_types = hf.get("layer_types", [])
    other = (
        next((kind for kind in layer_types if kind != "full_attention"), None)
        if isinstance(layer_types, list)
        else layer_types
    )
    if other is not None:
        refuse(f"layer_types {other!r}")
    if hf.get("quantization_config"):
        quantised = hf["quantization_config"]
        method = (
            quantised.get("quant_method", "unknown method")
            if isinstance(quantised, dict)
            else quantised
        )
        refuse(f"a quantised checkpoint ({method})")
    if value("hidden_act", "silu", "text") != "silu":
        refuse(f"hidden_act {hf['hidden_act']!r}")
    heads, hidden = value("num_attention_heads", None, "count"), value("hidden_size", None, "count")
    config = ModelConfig(
        vocab_size=value("vocab_size", None, "count"),
        hidden_size=hidden,
        intermediate_size=value("intermediate_size", None, "count"),
        num_layers=value("num_hidden_layers", None, "count"),
        num_heads=heads,
        num_kv_heads=value("num_key_value_heads", heads, "count"),
        head_dim=value("head_dim", 128 if family == "qwen3" else hidden // heads, "count"),
        tie_word_embeddings=value("tie_word_embeddings", False, "flag"),
        qkv_bias=family == "qwen2" or value("attention_bias", False, "flag"),
        qk_norm=family == "qwen3",
        rope_theta=_rope_theta(hf, where),
        rms_norm_eps=value("rms_norm_eps", 1e-6, "positive"),
        max_position_embeddings=value("max_position_embeddings", 32768, "count"),
    )
    if config.num_heads % config.num_kv_heads:
        refuse(
            f"num_attention_heads {config.num_heads} with num_key_value_heads {config.num_kv_heads}, which does not divide them,"
        )
    if config.head_dim % 2:
        refuse(f"head_dim {config.head_dim}, which is odd,")
    return config


_KINDS = {
    "count": "a whole number above 0",
    "positive": "a number above 0",
    "flag": "true or false",
    "text": "a string",
    "object": "an object",
}


def _checked(found, name, kind, where):
    """A value of config.json, if it is of this kind of `_KINDS`. Raises UserError."""
    number = (
        isinstance(found, (int, float)) and not isinstance(found, bool) and 0 < found < math.inf
    )
    fits = {
        "count": number and found == int(found),
        "positive": number,
        "flag": isinstance(found, bool),
        "text": isinstance(found, str),
        "object": isinstance(found, dict),
    }
    if not fits[kind]:
        raise UserError(
            f"{where}: config.json has {name} {found!r:.60}, which is not {_KINDS[kind]}"
        )
    return int(found) if kind == "count" else found


def _rope_theta(hf, where):
    """The base of the rotary frequencies, wherever a version of `transformers` wrote it: on its own (4), in rope_parameters (5), there
    for all layers or by their type. Raises UserError for frequencies that are scaled, and where two places differ."""
    outside = _checked(hf.get("rope_theta", 10000.0), "rope_theta", "positive", where)
    thetas = []
    for name in ("rope_scaling", "rope_parameters"):
        given = _checked(hf.get(name, {}), name, "object", where)
        nested = {key: part for key, part in given.items() if isinstance(part, dict)}
        if nested.keys() - {"full_attention"}:
            raise UserError(f"{where}: {name} of {', '.join(sorted(nested))} is not supported")
        given = given | nested.get("full_attention", {})
        given = {
            key: value for key, value in given.items() if value is not None and key not in nested
        }
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default" or given.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{where}: rope scaling {kind!r} is not supported")
        if given:
            thetas.append(
                _checked(given.get("rope_theta", outside), "rope_theta", "positive", where)
            )
    if hf.get("partial_rotary_factor", 1) != 1:
        raise UserError(
            f"{where}: rope scaling with partial_rotary_factor {hf['partial_rotary_factor']} is not supported"
        )
    if len(set(thetas)) > 1:
        raise UserError(
            f"{where}: rope_scaling and rope_parameters have different rope_theta ({thetas[0]:g}, {thetas[1]:g}); keep one of them"
        )
    return float(thetas[0] if thetas else outside)


def config_to_hf(config, eos_token_id, dtype):
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
