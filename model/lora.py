"""Low-rank adapters beside frozen linear layers (LoRA, Hu et al., arXiv 2106.09685), and PEFT's names for them.

W x becomes W x + s · B A x, with A [R, in] and B [out, R]. B starts at 0, so training starts from the base itself. s is alpha / R, or
alpha / √R (rsLoRA, Kalajdzievski, arXiv 2312.03732: the size of the update no longer shrinks as the rank grows).
The adapted model is a second tree of modules over the same tensors: the base stays a model of its own, at no memory. It is the reference
policy of `grpo`. Adapters are master weights in fp32; the base is held once, in the compute dtype.
"""

import copy
import dataclasses
import hashlib

import torch

from errors import UserError
from model.transformer import Linear

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model.model."  # what PEFT puts before our names of the layers of a Qwen2ForCausalLM or Qwen3ForCausalLM


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """base: the name under which PEFT finds the base, for the adapter's adapter_config.json; may be empty."""

    rank: int
    alpha: float
    targets: tuple = TARGETS
    dropout: float = 0.0
    rslora: bool = False
    base: str = ""

    @property
    def scale(self):
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def parse_targets(text):
    """--lora_targets as a tuple of layer names. Raises UserError."""
    names = (
        TARGETS if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    )
    for name in names:
        if name not in TARGETS:
            raise UserError(
                f"--lora_targets: no layer {name!r}; choose from {', '.join(TARGETS)}, or all"
            )
    return names


# --- the adapted model -----------------------------------------------------------------------------------------------


class Dropout:
    """What of a layer's input its adapter sees while training.

    Whether a feature is kept is a hash of (seed, step, the document's tokens, position in it, layer,
    feature): it belongs to the token, wherever its document lies. How the batch is cut into
    micro-batches and ranks, a resumed run, activations that are computed a second time and the device
    change nothing. Documents of the same tokens share their masks within a step.
    """

    def __init__(self, share, seed):
        self.share, self.seed, self.step, self.applied, self.key_T = share, seed, 0, True, None
        # one feature costs 16 bits: it is kept if they are below `level`
        self.level = min(max(round((1 - share) * 2**16), 1), 2**16 - 1)

    def begin(self, step, applied=True):
        """Before the forward passes of a step. applied=False: whole adapters, because log-probs are
        compared with some that were taken without masks."""
        self.step, self.applied = step, applied

    def see(self, model, args):
        """Before every forward pass of the whole model: a key for each of its tokens."""
        if self.share and torch.is_grad_enabled():
            tokens_T, positions_T, *_ = args
            self.key_T = token_keys(tokens_T, positions_T)

    def active(self, layer):
        return self.share > 0 and self.applied and layer.training and torch.is_grad_enabled()

    def __call__(self, x_TD, layer):
        """x_TD with the features of `layer` (its name) that are left out set to 0, the others scaled up."""
        stream_T1 = mix(self.key_T ^ _seed(self.seed, self.step, layer)).unsqueeze(1)
        words = torch.arange(
            -(-x_TD.shape[1] // 4), device=x_TD.device
        )  # 64 bits are four features'
        bits_TD = mix(stream_T1 + words * GOLDEN).view(torch.int16)[:, : x_TD.shape[1]]
        kept_TD = bits_TD < self.level - 2**15  # of signed numbers
        return x_TD * kept_TD * (2**16 / self.level)


GOLDEN = -0x61C8864680B583EB  # 2^64 / the golden ratio, as a signed number


def mix(x):
    """Every bit of the result depends on every bit of x, an int64 tensor whose products wrap around
    (splitmix64's finaliser: Steele et al. 2014, "Fast splittable pseudorandom number generators")."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift_right(x, 31)


def _shift_right(x, bits):
    """x >> bits with zeros shifted in: torch's own repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def token_keys(tokens_T, positions_T):
    """For every packed token an int64 hash of its position and of all tokens of its document."""
    document_T = (positions_T == 0).cumsum(0) - 1
    place_T = mix((positions_T + 1) * GOLDEN)
    sums_B = torch.zeros_like(tokens_T).index_add_(0, document_T, mix(place_T ^ tokens_T))
    return mix(sums_B[document_T] ^ place_T)


class LoraLinear(Linear):
    """A frozen linear layer, whose tensors it shares, and its adapter."""

    def __init__(self, base, name, config, dropout, dtype):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
            self.lora_A = Linear(base.in_features, config.rank, bias=False)
            self.lora_B = Linear(config.rank, base.out_features, bias=False)
        self.weight, self.bias, self.name, self.scale, self.dropout = (
            base.weight,
            base.bias,
            name,
            config.scale,
            dropout,
        )
        for part in (self.lora_A, self.lora_B):
            part.to(dtype).to_empty(device=base.weight.device)

    def forward(self, x):
        # generation, evaluation and the scoring of samples run without gradients, and with the whole adapter
        seen = self.masked(x) if self.dropout.active(self) else x
        return super().forward(x) + self.lora_B(self.lora_A(seen) * self.scale)

    @torch.compiler.disable  # the layer's name and the step would make a graph for every layer and step
    def masked(self, x):
        return self.dropout(x, self.name)

    @torch.no_grad()
    def init_weights(self, seed):
        """A uniform in ±1/√in, B zero, as the paper's code and PEFT do; the same on every device, whatever the other targets."""
        bound = self.in_features**-0.5
        generator = torch.Generator().manual_seed(_seed(seed, self.name))
        self.lora_A.weight.copy_(
            (torch.rand(self.lora_A.weight.shape, generator=generator) * 2 - 1) * bound
        )
        self.lora_B.weight.zero_()

    @torch.no_grad()
    def merged(self):
        return merge(self.weight, self.lora_A.weight, self.lora_B.weight, self.scale)


def merge(weight, a, b, scale):
    """W + s · B A in the widest of their dtypes, at least fp32: rounding to bf16 would lose most of a small update."""
    wide = torch.promote_types(torch.promote_types(weight.dtype, a.dtype), torch.float32)
    return weight.to(wide) + (b.to(wide) @ a.to(wide)) * scale


def adapt(base, config, seed, dtype=torch.float32):
    """A model that shares every tensor with `base`, freezes them, and adds adapters of `dtype` to the targets."""
    base.requires_grad_(False)
    model = copy.deepcopy(
        base, {id(p): p for p in base.parameters()}
    )  # deepcopy takes what the memo holds for the copy
    model.lora, model.dropout = config, Dropout(config.dropout, seed)
    model.register_forward_pre_hook(model.dropout.see)
    for name, layer in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in config.targets:
            adapted = LoraLinear(layer, name, config, model.dropout, dtype)
            adapted.init_weights(seed)
            setattr(model.get_submodule(parent), child, adapted)
    return model


def adapters(model):
    """{name of the layer: its LoraLinear}; empty for a model without adapters."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}


def merged_parameters(model):
    """(name, tensor) of the model without adapters that computes the same, in the adapters' dtype; of a plain model its own."""
    layers = {f"{name}.weight": layer for name, layer in adapters(model).items()}
    dtype = next((layer.lora_A.weight.dtype for layer in layers.values()), None)
    for name, p in model.named_parameters():
        if ".lora_" not in name:
            yield name, layers[name].merged() if name in layers else p.to(dtype or p.dtype)


def _seed(*parts):
    return int.from_bytes(
        hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little", signed=True
    )


# --- PEFT's format ---------------------------------------------------------------------------------------------------


def to_peft(model):
    """(adapter_config.json as a dict, the tensors of adapter_model.safetensors)."""
    c = model.lora
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": c.base or None,
        "inference_mode": True,
    }
    settings |= {
        "r": c.rank,
        "lora_alpha": int(c.alpha) if c.alpha == int(c.alpha) else c.alpha,
        "use_rslora": c.rslora,
    }
    settings |= {
        "target_modules": list(c.targets),
        "lora_dropout": c.dropout,
        "init_lora_weights": True,
    }
    settings |= {
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
    }
    parts = {
        f"{name}.{part}.weight": getattr(layer, part).weight
        for name, layer in adapters(model).items()
        for part in ("lora_A", "lora_B")
    }
    return settings, {PREFIX + name: p.detach().cpu().contiguous() for name, p in parts.items()}


# what changes the computation and is not done here; the tensors say which layers have adapters, whatever chose them
REFUSED = """use_dora modules_to_save rank_pattern alpha_pattern lora_bias fan_in_fan_out trainable_token_indices target_parameters
    layer_replication use_qalora use_bdlora alora_invocation_tokens arrow_config kasa_config monteclora_config""".split()


def check_peft(settings, where):
    """Refuse an adapter_config.json that means something other than W + s · B A. `where`: its path. Raises UserError."""
    if settings.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type {settings.get('peft_type')!r} is not supported; LORA is"
        )
    if settings.get("bias", "none") != "none":
        raise UserError(f"{where}: bias {settings['bias']!r} is not supported; none is")
    for name in REFUSED:
        if settings.get(name):
            raise UserError(
                f"{where}: {name} is not supported; merge the adapter with PEFT and name the merged folder"
            )
    if settings.get("init_lora_weights", True) not in (
        True,
        False,
        None,
        "gaussian",
        "eva",
        "orthogonal",
    ):  # PiSSA and its kin move the base
        raise UserError(
            f"{where}: init_lora_weights {settings['init_lora_weights']!r} is not supported: it changes the base; merge it with PEFT"
        )
    r, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(r) is not int or r < 1 or type(alpha) not in (int, float):
        raise UserError(f"{where}: r {r!r} and lora_alpha {alpha!r} must be numbers, r at least 1")


def from_peft(settings, tensors, where):
    """(LoraConfig, {name of the layer: (A, B)}) of an adapter's two files. `where`: its folder. Raises UserError."""
    check_peft(settings, where)
    parts = {"lora_A": {}, "lora_B": {}}
    for key, tensor in tensors.items():
        layer, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if (
            key != f"{PREFIX}{layer}.{part}.weight"
            or part not in parts
            or layer.rpartition(".")[2] not in TARGETS
        ):
            raise UserError(
                f"{where}: tensor {key} is not supported; adapters of {', '.join(TARGETS)} are"
            )
        if tensor.dim() != 2 or tensor.shape[part == "lora_B"] != settings["r"]:
            raise UserError(
                f"{where}: {key} has shape {list(tensor.shape)}, but adapter_config.json says r {settings['r']}"
            )
        parts[part][layer] = tensor
    if not tensors or parts["lora_A"].keys() != parts["lora_B"].keys():
        raise UserError(
            f"{where}: adapter_model.safetensors is incomplete: {len(parts['lora_A'])} lora_A and {len(parts['lora_B'])} lora_B tensors"
        )
    targets = tuple(t for t in TARGETS if any(layer.endswith(f".{t}") for layer in parts["lora_A"]))
    config = LoraConfig(
        settings["r"],
        settings["lora_alpha"],
        targets,
        settings.get("lora_dropout") or 0.0,
        bool(settings.get("use_rslora")),
    )
    return config, {layer: (a, parts["lora_B"][layer]) for layer, a in parts["lora_A"].items()}
