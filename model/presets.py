"""The shapes of known models by name, for `--model` and `--teacher`: a preset's weights are random.

From the config.json of each checkpoint.
"""

from model.transformer import ModelConfig, RopeScaling

RANDOM = "random:"  # before a preset, where random weights are what is wanted


def _shape(
    *, hidden, layers, heads, mlp, kv_heads=2, vocab=151936, head_dim=0, tied=True, **more
) -> ModelConfig:
    """What is not given is as in the small ones of Qwen2.5."""
    head_dim = head_dim or hidden // heads
    return ModelConfig(vocab, hidden, mlp, layers, heads, kv_heads, head_dim, tied, **more)


def _llama(*, theta, context, **shape) -> ModelConfig:
    return _shape(
        qkv_bias=False,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        max_position_embeddings=context,
        **shape,
    )


def _gemma3(*, layers, window, head_dim=256, vocab=262144, **shape) -> ModelConfig:
    """One layer of six sees all tokens, the others a window."""
    windows = [0 if layer % 6 == 5 else window for layer in range(layers)]
    return _shape(
        layers=layers,
        kv_heads=1,
        head_dim=head_dim,
        vocab=vocab,
        qkv_bias=False,
        qk_norm=True,
        windows=tuple(windows),
        activation="gelu_pytorch_tanh",
        sandwich_norms=True,
        norm_offset=1.0,
        scale_embedding=True,
        **shape,
    )


PRESETS = {
    "qwen2.5-0.5b": _shape(hidden=896, layers=24, heads=14, mlp=4864),
    "qwen2.5-1.5b": _shape(hidden=1536, layers=28, heads=12, mlp=8960),
    "qwen2.5-3b": _shape(hidden=2048, layers=36, heads=16, mlp=11008),
    "qwen2.5-7b": _shape(
        hidden=3584, layers=28, heads=28, mlp=18944, kv_heads=4, vocab=152064, tied=False
    ),
    "qwen3-0.6b": _shape(
        hidden=1024,
        layers=28,
        heads=16,
        mlp=3072,
        kv_heads=8,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        max_position_embeddings=40960,
    ),
    "llama-3.2-1b": _llama(
        hidden=2048,
        layers=16,
        heads=32,
        mlp=8192,
        kv_heads=8,
        vocab=128256,
        theta=5e5,
        context=131072,
        rope_scaling=RopeScaling(factor=32.0, context=8192),
    ),
    "smollm2-135m": _llama(
        hidden=576, layers=30, heads=9, mlp=1536, kv_heads=3, vocab=49152, theta=1e5, context=8192
    ),
    "smollm2-360m": _llama(
        hidden=960, layers=32, heads=15, mlp=2560, kv_heads=5, vocab=49152, theta=1e5, context=8192
    ),
    "tinyllama-1.1b": _llama(
        hidden=2048,
        layers=22,
        heads=32,
        mlp=5632,
        kv_heads=4,
        vocab=32000,
        theta=1e4,
        context=2048,
        tied=False,
    ),
    "gemma-3-270m": _gemma3(hidden=640, layers=18, heads=4, mlp=2048, window=512),
    "gemma-3-1b": _gemma3(hidden=1152, layers=26, heads=4, mlp=6912, window=512),
    # The teacher and the students of the toy task; small bodies under a full vocabulary.
    "tiny-teacher": _shape(hidden=96, layers=3, heads=4, mlp=256, vocab=512),
    "tiny": _shape(hidden=96, layers=2, heads=4, mlp=256, vocab=512),
    "mini": _shape(hidden=48, layers=2, heads=4, mlp=128, vocab=512),
    "tiny-llama": _llama(
        hidden=96, layers=2, heads=4, mlp=256, kv_heads=2, vocab=512, theta=1e4, context=32768
    ),
    "tiny-gemma3": _gemma3(
        hidden=96, layers=6, heads=4, mlp=256, window=64, head_dim=24, vocab=512
    ),
    "small-teacher": _shape(hidden=384, layers=6, heads=6, mlp=1024, vocab=152064, tied=False),
    "small": _shape(hidden=256, layers=4, heads=4, mlp=704),
}
