"""The Qwen2.5 / Qwen3 transformer.

`forward` returns hidden states, never logits: a loss selects the rows that it needs and multiplies
them by the head itself. Parameters have the names of Hugging Face checkpoints (without the leading
`model.`), so loading is a copy. Master weights are fp32 on every device; a layer casts its weight
to the dtype of its input, there is no autocast.

Shapes: T packed tokens, D hidden, V vocabulary, H query heads, K key-value heads, E head size.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# (layer index, q_THE, k_TKE, v_TKE) -> o_THE. Decides which tokens see each other:
# `kernels.attention.PackedAttention` in training, a KV cache in generation.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]  # cosines and sines, both [T, 1, E]
# One weight and bias for several linear layers of one input, where generation has joined them.
Fused = tuple[Tensor, Tensor | None] | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, and what differs between families."""

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
    def family(self) -> str:
        """What Hugging Face calls `model_type`."""
        return "qwen3" if self.qk_norm else "qwen2"


def _qwen25(*, hidden, layers, heads, mlp, kv_heads=2, vocab=151936, tied=True) -> ModelConfig:
    head_dim = hidden // heads
    return ModelConfig(vocab, hidden, mlp, layers, heads, kv_heads, head_dim, tied)


# Shapes only: the weights of a preset are random. From the config.json of each checkpoint.
PRESETS = {
    "qwen2.5-0.5b": _qwen25(hidden=896, layers=24, heads=14, mlp=4864),
    "qwen2.5-1.5b": _qwen25(hidden=1536, layers=28, heads=12, mlp=8960),
    "qwen2.5-3b": _qwen25(hidden=2048, layers=36, heads=16, mlp=11008),
    "qwen2.5-7b": _qwen25(
        hidden=3584, layers=28, heads=28, mlp=18944, kv_heads=4, vocab=152064, tied=False
    ),
    "qwen3-0.6b": ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        max_position_embeddings=40960,
    ),
    # The teacher and the students of the toy task; small bodies under a full vocabulary.
    "tiny-teacher": _qwen25(hidden=96, layers=3, heads=4, mlp=256, vocab=512),
    "tiny": _qwen25(hidden=96, layers=2, heads=4, mlp=256, vocab=512),
    "mini": _qwen25(hidden=48, layers=2, heads=4, mlp=128, vocab=512),
    "small-teacher": _qwen25(hidden=384, layers=6, heads=6, mlp=1024, vocab=152064, tied=False),
    "small": _qwen25(hidden=256, layers=4, heads=4, mlp=704),
}


class Linear(nn.Linear):
    """A linear layer that casts its weight to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in at least fp32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * wide.to(x.dtype)


def rope_tables(positions_T: Tensor, config: ModelConfig, dtype: torch.dtype) -> Rope:
    """The rotary embedding of each position (Su et al., arXiv 2104.09864), as [T, 1, E].

    A head's vector is split into halves, not into neighbouring pairs, as in the released
    checkpoints; so the angles are there twice, one half behind the other.
    """
    wide = torch.promote_types(dtype, torch.float32)
    even_E = torch.arange(0, config.head_dim, 2, device=positions_T.device, dtype=wide)
    frequency_E = config.rope_theta ** -(even_E / config.head_dim)
    angle_TE = positions_T.to(wide).unsqueeze(1) * frequency_E
    angle_T1E = torch.cat((angle_TE, angle_TE), 1).unsqueeze(1)
    return angle_T1E.cos().to(dtype), angle_T1E.sin().to(dtype)


def rotate(x_THE: Tensor, rope: Rope) -> Tensor:
    """Apply the rotary embedding to queries or keys."""
    cos_T1E, sin_T1E = rope
    first, second = x_THE.chunk(2, -1)
    return x_THE * cos_T1E + torch.cat((-second, first), -1) * sin_T1E


class Attention(nn.Module):
    """The projections of grouped-query attention. Attention itself is an `Attend` function."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_heads * self.head_dim, config.num_kv_heads * self.head_dim
        self.q_proj = Linear(hidden, q_size, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, kv_size, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, hidden, bias=False)
        self.qkv_sizes = [q_size, kv_size, kv_size]
        self.fused: Fused = None
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def qkv(self, x_TD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, E], keys and values [T, K, E]; queries and keys are rotated."""
        if self.fused:
            q, k, v = F.linear(x_TD, *self.fused).split(self.qkv_sizes, 1)
        else:
            q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        heads = (-1, self.head_dim)
        q_THE = self.q_norm(q.unflatten(1, heads))
        k_TKE = self.k_norm(k.unflatten(1, heads))
        return rotate(q_THE, rope), rotate(k_TKE, rope), v.unflatten(1, heads)


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.fused: Fused = None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fused:
            gate, up = F.linear(x_TD, *self.fused).chunk(2, 1)
        else:
            gate, up = self.gate_proj(x_TD), self.up_proj(x_TD)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """A transformer layer, in two halves around attention that `torch.compile` can take."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.is_compiled = False

    def before_attention(self, x_TD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.qkv(self.input_layernorm(x_TD), rope)

    def after_attention(self, x_TD: Tensor, o_THE: Tensor) -> Tensor:
        x_TD = x_TD + self.self_attn.o_proj(o_THE.flatten(1))
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))

    def forward(self, layer: int, x_TD: Tensor, rope: Rope, attend: Attend) -> Tensor:
        before, after = Block.before_attention, Block.after_attention
        if self.is_compiled:
            before, after = compiled_halves()
        q_THE, k_TKE, v_TKE = before(self, x_TD, rope)
        return after(self, x_TD, attend(layer, q_THE, k_TKE, v_TKE))


@functools.cache
def compiled_halves() -> tuple[Callable, Callable]:
    """What lies before and after attention, compiled once: all layers of all models share it.

    Shapes may vary: `torch.compile` makes a size symbolic at the second value that it sees.
    """
    # Training, evaluation and generation, in several widths, need more than the default of 8.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(32, limit)
    return torch.compile(Block.before_attention), torch.compile(Block.after_attention)


def embed(tokens_T: Tensor, weight_VD: Tensor, tied: bool) -> Tensor:
    """The embedded tokens [T, D].

    On a CPU the gradient of a tied embedding goes straight into `weight_VD.grad`, which the head
    fills with the gradient of the same matrix. Autograd would make a second [V, D] matrix of it and
    a third for the sum: 6 % of a step of distillation. A GPU's sum of rows is not deterministic.
    """
    if not tied or weight_VD.is_cuda or not (weight_VD.requires_grad and torch.is_grad_enabled()):
        return F.embedding(tokens_T, weight_VD)

    def add_rows(grad_TD: Tensor) -> None:
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        weight_VD.grad.index_add_(0, tokens_T, grad_TD)

    x_TD = F.embedding(tokens_T, weight_VD.detach()).requires_grad_()
    x_TD.register_hook(add_rows)
    return x_TD


class Transformer(nn.Module):
    """Tokens to hidden states. `compute_dtype` is that of activations; None: as the weights."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.activation_checkpointing = False
        empty_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_VD(self) -> Tensor:
        """The matrix that turns hidden states into logits."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """The hidden states [T, D] of packed tokens; positions restart at each document."""
        x_TD = embed(tokens_T, self.embed_tokens.weight, self.config.tie_word_embeddings)
        x_TD = x_TD.to(self.compute_dtype or x_TD.dtype)
        rope = rope_tables(positions_T, self.config, x_TD.dtype)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.layers):
            args = (layer, x_TD, rope, attend)
            if recompute:
                x_TD = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
            else:
                x_TD = block(*args)
        return self.norm(x_TD)

    @torch.no_grad()
    def init_weights(self, seed: int) -> Self:
        """Fill in random weights, the same ones on every device. Returns the model.

        Matrices are normal with deviation 0.6/√hidden (0.02 for the 0.5B model), those that write
        to the residual stream scaled by 1/√(2·layers) (Radford et al. 2019). Biases are zero, norm
        weights one.
        """
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

    def compile_blocks(self) -> None:
        """`torch.compile` all blocks, their attention aside."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.is_compiled = True

    def flops_per_token(self, context: float) -> float:
        """Forward FLOPs of the body for one token that attends to `context` tokens on average."""
        matrices = sum(p.numel() for p in self.layers.parameters() if p.dim() == 2)
        config = self.config
        attention = 2 * config.num_heads * config.head_dim * context * config.num_layers
        return 2 * (matrices + attention)
