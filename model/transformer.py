"""The transformer of Qwen2.5, Qwen3, Llama and Gemma 3: they differ in fields of `ModelConfig`.

`forward` returns hidden states, never logits: a loss selects the rows that it needs and multiplies
them by the head itself. Parameters have the names of Hugging Face checkpoints (without the leading
`model.`), so loading is a copy. Master weights are fp32 on every device; a layer casts its weight
to the dtype of its input, there is no autocast.

Shapes: T packed tokens, D hidden, V vocabulary, H query heads, K key-value heads, E head size.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.cpu import fastest_product
from kernels.elementwise import gated, rms_norm
from model.sharding import fill

# (layer index, q_THE, k_TKE, v_TKE, window) -> o_THE. Decides which tokens see each other:
# `kernels.attention.PackedAttention` in training, a KV cache in generation.
# One with an attribute `rotates` that is true gets queries and keys that are not rotated, and the
# Rope as one more argument.
Attend = Callable[..., Tensor]
Rope = tuple[Tensor, Tensor]  # cosines and signed sines, both [T, 1, E]
# One weight and bias for several linear layers of one input, where generation has joined them.
Fused = tuple[Tensor, Tensor | None] | None


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Rotary frequencies stretched for a context longer than that of pretraining.

    Waves longer than `context` / `low` tokens become `factor` times longer, those shorter than
    `context` / `high` stay, and those between are interpolated (Llama 3.1, arXiv 2407.21783).
    With context 0 all become longer (position interpolation, arXiv 2306.15595).
    """

    factor: float
    context: int = 0
    low: float = 1.0
    high: float = 4.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The shape of a model, and what differs between families.

    Attributes:
        qkv_bias: Queries, keys and values have biases.
        qk_norm: Queries and keys are normalised before they are rotated.
        windows: For each layer, how many tokens a query sees, its own included; 0: all. Empty
            where all layers see all.
        rope_scaling: Of the layers that see all.
        window_rope_theta: The rope_theta of the layers with a window.
        activation: Of the MLP's gate, a name in `kernels.elementwise.ACTIVATIONS`.
        sandwich_norms: What attention and MLP give is normalised, too.
        norm_offset: Added to the norms' weights.
        scale_embedding: The embedded tokens are multiplied by √hidden_size.
    """

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
    rope_scaling: RopeScaling | None = None
    windows: tuple[int, ...] = ()
    window_rope_theta: float = 1e4
    activation: str = "silu"
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    scale_embedding: bool = False

    @property
    def family(self) -> str:
        """What Hugging Face calls `model_type`."""
        if self.sandwich_norms:
            return "gemma3_text"
        if self.qk_norm:
            return "qwen3"
        return "qwen2" if self.qkv_bias else "llama"

    def window(self, layer: int) -> int:
        """How many tokens a query of the layer sees; 0: all."""
        return self.windows[layer] if self.windows else 0


class Linear(nn.Linear):
    """A linear layer that casts its weight to the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class RMSNorm(nn.Module):
    """Divides by the root mean square. Gemma stores the weights less 1, the `offset`."""

    def __init__(self, size: int, config: ModelConfig) -> None:
        super().__init__()
        self.offset = config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1 - self.offset))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


def rope_tables(
    positions_T: Tensor,
    head_dim: int,
    theta: float,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> Rope:
    """The rotary embedding of each position (Su et al., arXiv 2104.09864), as [T, 1, E].

    A head's vector is split into halves, not into neighbouring pairs, as in the released
    checkpoints; so the angles are there twice, one half behind the other: the first half turns by
    minus sine times the second, the second by plus sine times the first.
    """
    wide = torch.promote_types(dtype, torch.float32)
    even_E = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=wide)
    frequency_E = theta ** -(even_E / head_dim)
    if scaling:
        waves_E = scaling.context * frequency_E / (2 * math.pi)  # in the context of pretraining
        kept_E = ((waves_E - scaling.low) / (scaling.high - scaling.low)).clamp(0, 1)
        frequency_E = frequency_E * (kept_E + (1 - kept_E) / scaling.factor)
    angle_TE = positions_T.to(wide).unsqueeze(1) * frequency_E
    cos_TE, sin_TE = angle_TE.cos().to(dtype), angle_TE.sin().to(dtype)
    cos_T1E = torch.cat((cos_TE, cos_TE), 1).unsqueeze(1)
    return cos_T1E, torch.cat((-sin_TE, sin_TE), 1).unsqueeze(1)


def rotate(x_THE: Tensor, rope: Rope) -> Tensor:
    """Apply the rotary embedding to queries or keys."""
    cos_T1E, sin_T1E = rope
    return x_THE * cos_T1E + x_THE.roll(x_THE.shape[-1] // 2, -1) * sin_T1E


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
            self.q_norm = RMSNorm(self.head_dim, config)
            self.k_norm = RMSNorm(self.head_dim, config)

    def qkv(self, x_TD: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, H, E], keys and values [T, K, E]; with a rope, the first two rotated."""
        if self.fused:
            q, k, v = F.linear(x_TD, *self.fused).split(self.qkv_sizes, 1)
        else:
            q, k, v = self.q_proj(x_TD), self.k_proj(x_TD), self.v_proj(x_TD)
        heads = (-1, self.head_dim)
        q_THE = self.q_norm(q.unflatten(1, heads))
        k_TKE = self.k_norm(k.unflatten(1, heads))
        if rope:
            q_THE, k_TKE = rotate(q_THE, rope), rotate(k_TKE, rope)
        return q_THE, k_TKE, v.unflatten(1, heads)


class MLP(nn.Module):
    """SwiGLU, or GeGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = config.activation
        self.fused: Fused = None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.fused:
            gate, up = F.linear(x_TD, *self.fused).chunk(2, 1)
        else:
            gate, up = self.gate_proj(x_TD), self.up_proj(x_TD)
        return self.down_proj(gated(gate, up, self.activation))


class Block(nn.Module):
    """A transformer layer, in two halves around attention that `torch.compile` can take."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)
        self.sandwich_norms = config.sandwich_norms
        if self.sandwich_norms:
            self.pre_feedforward_layernorm = RMSNorm(config.hidden_size, config)
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)
        self.is_compiled = False

    def before_attention(self, x_TD: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.qkv(self.input_layernorm(x_TD), rope)

    def after_attention(self, x_TD: Tensor, o_THE: Tensor) -> Tensor:
        attended_TD = self.self_attn.o_proj(o_THE.flatten(1))
        if not self.sandwich_norms:
            x_TD = x_TD + attended_TD
            return x_TD + self.mlp(self.post_attention_layernorm(x_TD))
        x_TD = x_TD + self.post_attention_layernorm(attended_TD)
        mixed_TD = self.mlp(self.pre_feedforward_layernorm(x_TD))
        return x_TD + self.post_feedforward_layernorm(mixed_TD)

    def forward(
        self, layer: int, x_TD: Tensor, rope: Rope, attend: Attend, window: int = 0
    ) -> Tensor:
        before, after = Block.before_attention, Block.after_attention
        if self.is_compiled:
            before, after = compiled_halves()
        if getattr(attend, "rotates", False):
            o_THE = attend(layer, *before(self, x_TD, None), window, rope)
        else:
            o_THE = attend(layer, *before(self, x_TD, rope), window)
        return after(self, x_TD, o_THE)


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

    The gradient of a tied embedding goes straight into `weight_VD.grad`, which the head fills with
    the gradient of the same matrix. Autograd would make a second [V, D] matrix of it and a third
    for the sum: on a CPU 6 % of a step of distillation.
    """
    if not tied or not (weight_VD.requires_grad and torch.is_grad_enabled()):
        return F.embedding(tokens_T, weight_VD)

    def add_rows(grad_TD: Tensor) -> None:
        if weight_VD.grad is None:
            weight_VD.grad = torch.zeros_like(weight_VD)
        if weight_VD.is_cuda:  # sorts the ids: there index_add_ sums in an order that varies
            weight_VD.grad.index_put_((tokens_T,), grad_TD, accumulate=True)
        else:
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
        self.decodes_in_shards = False  # generation gathers no copy of a model in shards
        # nn.Embedding's own initialiser would import the compiler here: a second
        empty_VD = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(empty_VD, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_VD(self) -> Tensor:
        """The matrix that turns hidden states into logits."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """The hidden states [T, D] of packed tokens; positions restart at each document."""
        config = self.config
        x_TD = embed(tokens_T, self.embed_tokens.weight, config.tie_word_embeddings)
        x_TD = x_TD.to(self.compute_dtype or x_TD.dtype)
        if config.scale_embedding:  # by a factor of that dtype
            x_TD = x_TD * torch.tensor(config.hidden_size**0.5, dtype=x_TD.dtype).item()
        size, dtype = config.head_dim, x_TD.dtype
        rope = rope_tables(positions_T, size, config.rope_theta, dtype, config.rope_scaling)
        window_rope = None
        if any(config.windows):
            window_rope = rope_tables(positions_T, size, config.window_rope_theta, dtype)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        with self.fastest_products(tokens_T):
            for layer, block in enumerate(self.layers):
                window = config.window(layer)
                args = (layer, x_TD, window_rope if window else rope, attend, window)
                if recompute:
                    x_TD = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
                else:
                    x_TD = block(*args)
        return self.norm(x_TD)

    def fastest_products(self, tokens_T: Tensor) -> contextlib.AbstractContextManager[None]:
        """`fastest_product` for a forward or a backward of these tokens."""
        a_product = len(tokens_T) * self.config.hidden_size**2
        return fastest_product(self.norm.weight, a_product)

    @torch.no_grad()
    def init_weights(self, seed: int) -> Self:
        """Fill in random weights, the same ones on every device. Returns the model.

        Matrices are normal with deviation 0.6/√hidden (0.02 for the 0.5B model), those that write
        to the residual stream scaled by 1/√(2·layers) (Radford et al. 2019). Biases are zero, norms
        multiply by one.
        """
        std = 0.6 / self.config.hidden_size**0.5
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                scale = std / (2 * self.config.num_layers) ** 0.5 if residual else std
                fill(p, torch.randn(p.shape, generator=generator) * scale)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1 - self.config.norm_offset)
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
