"""Low-rank adapters beside frozen linear layers (LoRA, Hu et al., arXiv 2106.09685).

W x becomes W x + s · B A x, with A [R, in] and B [out, R]. B starts at 0, so training starts from
the base itself. s is alpha / R, or alpha / √R (rsLoRA, Kalajdzievski, arXiv 2312.03732: the size of
the update no longer shrinks as the rank grows).

The adapted model is a second tree of modules over the same tensors: the base stays a model of its
own, at no memory, and serves GRPO as the reference policy. Adapters are fp32 master weights; the
base is there once, in the compute dtype.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from errors import UserError
from files import LARGEST, Fields, Json
from model.sampling import GOLDEN, mix
from model.sharding import fill, whole
from model.transformer import Linear, Transformer

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Pair = tuple[Tensor, Tensor]  # the A and B of a layer


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """The options of an adapter.

    base: the name under which PEFT finds the base, for adapter_config.json; may be empty.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0
    rslora: bool = False
    base: str = ""

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def parse_targets(text: str) -> tuple[str, ...]:
    """The layer names of --lora_targets. Raises UserError."""
    if text == "all":
        return TARGETS
    names = dict.fromkeys(part.strip() for part in text.split(","))
    for name in names:
        if name not in TARGETS:
            known = ", ".join(TARGETS)
            raise UserError(f"--lora_targets: no layer {name!r}; choose from {known}, or all")
    return tuple(names)


# --- dropout ------------------------------------------------------------------------------


class Dropout:
    """Drops features of the adapters' inputs while training.

    Whether a feature is kept is a hash of (seed, step, the document's tokens, the position in it,
    layer, feature). So the mask belongs to the token, wherever its document lies: it does not
    depend on how the batch is cut into micro-batches and ranks, nor on the device, a resumed run,
    or activations that are computed a second time. Documents of the same tokens share their masks
    within a step.
    """

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed
        self.step, self.applied = 0, True
        self.key_T = torch.empty(0, dtype=torch.long)
        # Each feature has 16 random bits: it is kept if they are below this level.
        self.level = min(max(round((1 - probability) * 2**16), 1), 2**16 - 1)
        # Compiled, the layer's name and the step would make a graph of their own each. Made here:
        # it imports the compiler, which takes a second, and models without adapters need not wait.
        self.masked = torch.compiler.disable(LoraLinear.masked)

    def begin(self, step: int, applied: bool = True) -> None:
        """Called before the forward passes of a step.

        applied: False turns dropout off, where log-probs are compared with some that were taken
        without it.
        """
        self.step, self.applied = step, applied

    def see(self, model: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Make a key for each token. A hook that runs before each forward pass of the model."""
        if self.probability and torch.is_grad_enabled():
            self.key_T = token_keys(args[0], args[1])

    def active(self, layer: nn.Module) -> bool:
        enabled = layer.training and torch.is_grad_enabled()
        return self.probability > 0 and self.applied and enabled

    def __call__(self, x_TD: Tensor, layer: str) -> Tensor:
        """x_TD with the dropped features of the layer set to 0, and the others scaled up."""
        features = x_TD.shape[1]
        stream_T1 = mix(self.key_T ^ _seed(self.seed, self.step, layer)).unsqueeze(1)
        # 64 bits are those of four features.
        word = torch.arange(-(-features // 4), device=x_TD.device)
        bits_TD = mix(stream_T1 + word * GOLDEN).view(torch.int16)[:, :features]
        kept_TD = bits_TD < self.level - 2**15  # int16 is signed
        return x_TD * kept_TD * (2**16 / self.level)


def token_keys(tokens_T: Tensor, positions_T: Tensor) -> Tensor:
    """For every packed token, an int64 hash of its position and of all tokens of its document."""
    document_T = (positions_T == 0).cumsum(0) - 1
    place_T = mix((positions_T + 1) * GOLDEN)
    sums_B = torch.zeros_like(tokens_T).index_add_(0, document_T, mix(place_T ^ tokens_T))
    return mix(sums_B[document_T] ^ place_T)


def _seed(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- the adapted model --------------------------------------------------------------------


class LoraLinear(Linear):
    """A frozen linear layer, whose tensors it shares, and its adapter."""

    def __init__(
        self, base: Linear, name: str, config: LoraConfig, dropout: Dropout, dtype: torch.dtype
    ) -> None:
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.name, self.scale, self.dropout = name, config.scale, dropout
        make = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.lora_A = Linear(base.in_features, config.rank, **make)
        self.lora_B = Linear(config.rank, base.out_features, **make)

    def forward(self, input: Tensor) -> Tensor:
        # Generation, evaluation and log-probs run without gradients, and without dropout.
        seen = input
        if self.dropout.active(self):
            seen = self.dropout.masked(self, input)  # pyright: ignore[reportCallIssue]
        return super().forward(input) + self.lora_B(self.lora_A(seen) * self.scale)

    def masked(self, x_TD: Tensor) -> Tensor:
        return self.dropout(x_TD, self.name)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """A uniform in ±1/√in, B zero, as the paper's code and PEFT have it.

        The same on every device, and whichever other layers are adapted.
        """
        generator = torch.Generator().manual_seed(_seed(seed, self.name))
        uniform = torch.rand(self.lora_A.weight.shape, generator=generator) * 2 - 1
        fill(self.lora_A.weight, uniform * self.in_features**-0.5)
        self.lora_B.weight.zero_()

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The weight of the plain layer that computes the same."""
        a, b = whole(self.lora_A.weight), whole(self.lora_B.weight)
        return merge(whole(self.weight), a, b, self.scale)


def merge(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """W + s · B A in the widest of their dtypes, at least fp32.

    Rounding to bf16 would lose most of a small update.
    """
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    return weight.to(wide) + (b.to(wide) @ a.to(wide)) * scale


def adapt(
    base: Transformer, config: LoraConfig, seed: int, dtype: torch.dtype = torch.float32
) -> Transformer:
    """Freeze `base`, and return a model that shares its tensors and has adapters of `dtype`."""
    base.requires_grad_(False)
    # What deepcopy finds in the memo it takes for the copy.
    model: Any = copy.deepcopy(base, {id(p): p for p in base.parameters()})
    model.lora, model.dropout = config, Dropout(config.dropout, seed)
    model.register_forward_pre_hook(model.dropout.see)
    for name, layer in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in config.targets:
            adapted = LoraLinear(layer, name, config, model.dropout, dtype)
            adapted.init_weights(seed)
            setattr(model.get_submodule(parent), child, adapted)
    return model


def adapters(model: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by their names; none in a model without adapters."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters of the plain model that computes the same.

    Adapted weights are merged, in the dtype of their adapters; the others are the model's own.
    """
    layers = adapters(model)
    for name, p in model.named_parameters():
        if layer := layers.get(name.removesuffix(".weight")):
            yield name, layer.merged()
        elif ".lora_" not in name:
            yield name, whole(p)


def merged_dtype(model: nn.Module) -> torch.dtype:
    """That of the adapters, or of a model without any."""
    weights = [layer.lora_A.weight for layer in adapters(model).values()]
    return next(iter(weights or model.parameters())).dtype


# --- PEFT's format ------------------------------------------------------------------------

# What PEFT puts before our layer names of a Qwen2ForCausalLM or Qwen3ForCausalLM.
PREFIX = "base_model.model.model."
# Settings that change the computation and are not supported. Others say which layers have adapters:
# the tensors say that too.
REFUSED = """use_dora modules_to_save rank_pattern alpha_pattern lora_bias fan_in_fan_out
    trainable_token_indices target_parameters layer_replication use_qalora use_bdlora
    alora_invocation_tokens arrow_config kasa_config monteclora_config""".split()
# Ways to initialise an adapter that leave the base as it is; PiSSA and its kin change it.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def to_peft(model: Any) -> tuple[Json, dict[str, Tensor]]:
    """The contents of an adapted model's adapter_config.json and adapter_model.safetensors."""
    config: LoraConfig = model.lora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base or None,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,
        "use_rslora": config.rslora,
        "target_modules": list(config.targets),
        "lora_dropout": config.dropout,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
    }
    tensors = {}
    for name, layer in adapters(model).items():
        for part in ("lora_A", "lora_B"):
            weight = whole(getattr(layer, part).weight)
            tensors[f"{PREFIX}{name}.{part}.weight"] = weight.detach().cpu().contiguous()
    return settings, tensors


def check_peft(settings: Json, source: Path) -> None:
    """Refuse an adapter_config.json that means something other than W + s · B A.

    Raises UserError, which begins with `source`.
    """
    fields = Fields(settings, source)
    kind, bias = settings.get("peft_type"), settings.get("bias", "none")
    if kind != "LORA":
        raise UserError(f"{source}: peft_type {kind!r} is not supported; LORA is")
    if bias != "none":
        raise UserError(f"{source}: bias {bias!r} is not supported; none is")
    fix = "merge the adapter with PEFT and name the merged folder"
    for name in REFUSED:
        if settings.get(name):
            raise UserError(f"{source}: {name} is not supported; {fix}")
    init = settings.get("init_lora_weights")
    if init not in PLAIN_INITS:
        raise UserError(
            f"{source}: init_lora_weights {init!r} is not supported: it changes the base; {fix}"
        )
    fields.get("r", int, least=1, most=1 << 24)
    fields.get("lora_alpha", float, least=-LARGEST)
    fields.get("lora_dropout", float, 0.0, most=1)
    fields.get("use_rslora", bool, False)
    fields.get("base_model_name_or_path", str, "", most=4096)


def from_peft(
    settings: Json, tensors: dict[str, Tensor], source: Path
) -> tuple[LoraConfig, dict[str, Pair]]:
    """The options, and (A, B) of each layer, that the two files of a folder describe.

    Raises UserError, which begins with `source`, the folder.
    """
    check_peft(settings, source)
    rank = settings["r"]
    parts = {"lora_A": {}, "lora_B": {}}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        target = layer.rpartition(".")[2]
        known = key == f"{PREFIX}{layer}.{part}.weight" and part in parts and target in TARGETS
        if not known:
            raise UserError(
                f"{source}: tensor {key} is not supported; adapters of {', '.join(TARGETS)} are"
            )
        if tensor.dim() != 2 or tensor.shape[part == "lora_B"] != rank:
            shape = list(tensor.shape)
            raise UserError(
                f"{source}: {key} has shape {shape}, but adapter_config.json says r {rank}"
            )
        parts[part][layer] = tensor
    a, b = parts["lora_A"], parts["lora_B"]
    if not tensors or a.keys() != b.keys():
        raise UserError(
            f"{source}: adapter_model.safetensors is incomplete: "
            f"{len(a)} lora_A and {len(b)} lora_B tensors"
        )
    found = {layer.rpartition(".")[2] for layer in a}
    config = LoraConfig(
        rank=rank,
        alpha=settings["lora_alpha"],
        targets=tuple(target for target in TARGETS if target in found),
        dropout=settings.get("lora_dropout") or 0.0,
        rslora=bool(settings.get("use_rslora")),
    )
    return config, {layer: (a[layer], b[layer]) for layer in a}
