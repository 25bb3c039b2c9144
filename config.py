"""Every knob of train.py, one documented line each, and what must hold between them. `config.py` makes them a command line."""

import dataclasses
import math

import torch

from data.batch import WEIGHTINGS
from data.dataset import task_of
from errors import UserError
from kernels.backend import CHOICES
from losses.grpo import KL_ESTIMATORS, VARIANTS
from losses.kd import DIVERGENCES, WITH_BETA
from model.lora import parse_targets
from options import ABOVE_0, knob
from rl.advantage import BASELINES
from rl.reward import PARTS

KD, GRPO = {"mode": ("kd",)}, {"mode": ("grpo",)}
WITH_TEACHER = [KD, GRPO | {"grpo_kd_coef": ABOVE_0}]
WITH_LORA = {"lora_rank": ABOVE_0}
WITH_REFERENCE = GRPO | {"grpo_kl_coef": ABOVE_0}
ON_POLICY = [GRPO, KD | {"kd_prefix": ("student", "teacher")}]  # a model writes what is trained on


def in_grpo(value):
    """`by` of a knob whose default in grpo is another one."""
    return {"mode": {"grpo": value}}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every knob. The defaults are those of the embedded task (seconds on a CPU); `recipes/` hold those of real models."""

    mode: str = knob("kd", "what to train by", choices=("sft", "kd", "grpo"))
    model: str = knob(
        "tiny",
        "the student: a checkpoint folder, a hub id, or a preset (random weights); tiny in grpo: the distilled one",
    )
    tokenizer: str = knob(
        "", "folder with tokenizer.json; empty: the model's, the teacher's, or the embedded one"
    )
    name: str = knob("", "the run's folder under --runs; empty: a new unique one")
    runs: str = knob("runs", "where runs are kept")
    resume: bool = knob(False, "continue the run --name from its newest checkpoint")
    seed: int = knob(0, "of the data order and of random weights")
    device: str = knob("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = knob(
        "auto",
        "of activations; auto: bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float64"),
    )

    data: str = knob(
        "word_problems:800",
        "a task (endless, or its first 800 problems), a .jsonl/.json/.parquet file, a folder, or org/name/file of a hub dataset",
        by=in_grpo("word_problems"),
    )
    train_examples: int = knob(0, "train on this many examples only; 0: all")
    template: str = knob(
        "auto",
        "how examples become text; auto: chat if the tokenizer has a template",
        choices=("auto", "chat", "plain"),
    )
    system_prompt: str = knob(
        "", "put before a conversation that has none (some templates bring their own)"
    )
    prompt_suffix: str = knob("", "put behind the question")
    chat_template_kwargs: str = knob(
        "", "arguments of the chat template, as in enable_thinking=false, or a JSON object"
    )
    max_length_policy: str = knob(
        "error",
        "what to do with an example longer than --micro_batch_tokens",
        choices=("error", "drop"),
    )
    show_batch: int = knob(
        0, "print this many examples of the first batch, what is trained on marked, and stop"
    )

    steps: int = knob(1000, "optimizer steps; 0: as many as --epochs asks for", by=in_grpo(200))
    epochs: float = knob(1.0, "passes over the data", only={"steps": (0,)})
    batch_size: int = knob(
        32, "examples (in grpo: samples) per step, over all ranks", by=in_grpo(128)
    )
    micro_batch_tokens: int = knob(8192, "tokens per forward pass; the longest example allowed")
    weighting: str = knob(
        "token",
        "every token counts the same, or every sequence",
        only={"mode": ("sft", "kd")},
        choices=WEIGHTINGS,
    )
    lr: float = knob(5e-3, "peak learning rate", by=in_grpo(3e-4))
    warmup: int = knob(20, "steps of linear warm-up")
    schedule: str = knob(
        "cosine",
        "after the warm-up",
        choices=("constant", "linear", "cosine"),
        by=in_grpo("linear"),
    )
    lr_floor: float = knob(
        0.1, "share of the peak rate at the last step", only={"schedule": ("linear", "cosine")}
    )
    beta1: float = knob(0.9, "AdamW")
    beta2: float = knob(0.98, "AdamW")
    eps: float = knob(1e-8, "AdamW")
    weight_decay: float = knob(
        0.3, "AdamW, on matrices only: not on norms, biases, embeddings", by=in_grpo(0.0)
    )
    max_grad_norm: float = knob(1.0, "global gradient norm; 0: never clipped")
    max_skipped: int = knob(5, "stop after this many non-finite steps in a row")

    lora_rank: int = knob(
        0, "train adapters of this rank beside the frozen model (LoRA); 0: train the model itself"
    )
    lora_alpha: float = knob(
        32.0, "the adapters' output is multiplied by this / rank", only=WITH_LORA
    )
    lora_rslora: bool = knob(False, "by this / square root of the rank instead", only=WITH_LORA)
    lora_targets: str = knob(
        "all",
        "the linear layers that get one, as in q_proj,v_proj; all: the seven projections",
        only=WITH_LORA,
    )
    lora_dropout: float = knob(
        0.0,
        "share of an adapter's inputs that a training step leaves out; not applied where log-probs are compared with a rollout's",
        only=WITH_LORA,
    )

    teacher: str = knob(
        "",
        "a checkpoint folder, a hub id or a preset; empty: the embedded task's, trained on first use",
        only=WITH_TEACHER,
    )
    kd_divergence: str = knob(
        "forward_kl",
        "from the teacher",
        only=WITH_TEACHER,
        choices=DIVERGENCES,
        by=in_grpo("reverse_kl"),
    )
    kd_beta: float = knob(
        0.5,
        "share of the teacher in the mixture (jsd, skew_forward_kl), of the student (skew_reverse_kl)",
        only=[c | {"kd_divergence": WITH_BETA} for c in WITH_TEACHER],
    )
    kd_temperature: float = knob(2.0, "divides both models' logits", only=KD)
    kd_t_squared: bool = knob(False, "multiply the divergence by the squared temperature", only=KD)
    kd_ce: float = knob(0.0, "share of cross-entropy in the loss, 0 to 1", only=KD)
    kd_prefix: str = knob(
        "data",
        "who writes what the divergence is taken on",
        only=KD,
        choices=("data", "student", "teacher"),
    )
    kd_mix: float = knob(
        1.0,
        "share of steps on what a model wrote; the others are on the data",
        only=KD | {"kd_prefix": ("student", "teacher")},
    )
    kd_signal: str = knob(
        "full",
        "all the teacher's probabilities, its likeliest and a bucket for the rest, or its log-prob of the sampled token as an advantage",
        only=KD,
        choices=("full", "topk", "sampled"),
    )
    kd_topk: int = knob(64, "how many of them", only=KD | {"kd_signal": ("topk",)})
    kd_cache: str = knob(
        "",
        "folder where they are kept for all the data, on first use; then no teacher is loaded",
        only=KD | {"kd_signal": ("topk",), "kd_prefix": ("data",)},
    )

    sample_tokens: int = knob(64, "new tokens at most per sample", only=ON_POLICY)
    sample_temperature: float = knob(
        1.0, "of sampling, and of all log-probs in grpo", only=ON_POLICY
    )
    sample_top_k: int = knob(0, "sample from the k likeliest tokens only; 0: all", only=ON_POLICY)
    sample_top_p: float = knob(
        1.0, "sample from the likeliest tokens with this mass only", only=ON_POLICY
    )
    sample_batch: int = knob(256, "sequences generated at once, per rank", only=ON_POLICY)
    sample_log: int = knob(8, "samples of each rollout kept in samples.jsonl", only=GRPO)

    grpo_variant: str = knob(
        "token",
        "the loss, with its paper's baseline and clip bounds; grpo: DeepSeekMath's, token: DAPO's",
        only=GRPO,
        choices=VARIANTS,
    )
    grpo_samples: int = knob(8, "samples per prompt", only=GRPO)
    grpo_reward: str = knob(
        "accuracy",
        f"parts with weights ({', '.join(PARTS)}), as in accuracy,format:0.5; or path/to/file.py:function",
        only=GRPO,
    )
    grpo_advantage: str = knob(
        "std",
        "what an advantage is measured against",
        only=GRPO,
        choices=BASELINES,
        by={"grpo_variant": {"dr_grpo": "mean"}},
    )
    grpo_clip_low: float = knob(
        0.2,
        "the ratio is clipped below 1 minus this; 1: it has no lower bound",
        only=GRPO,
        by={"grpo_variant": {"gspo": 3e-4, "cispo": 1.0}},
    )
    grpo_clip_high: float = knob(
        0.2, "and above 1 plus this", only=GRPO, by={"grpo_variant": {"token": 0.28, "gspo": 4e-4}}
    )
    grpo_kl_coef: float = knob(
        0.0, "weight of the KL to the reference; 0: no reference is held", only=GRPO
    )
    reference: str = knob(
        "",
        "a checkpoint folder, a hub id or a preset; empty: the policy as it starts",
        only=WITH_REFERENCE,
    )
    grpo_kl_in: str = knob(
        "loss",
        "where the KL goes: into the loss, or off the reward",
        only=WITH_REFERENCE,
        choices=("loss", "reward"),
    )
    grpo_kl_estimator: str = knob(
        "k3",
        "the KL's estimate; in the reward only k1 is right, in the loss k2 and k3 are",
        only=WITH_REFERENCE,
        choices=KL_ESTIMATORS,
        by={"grpo_kl_in": {"reward": "k1"}},
    )
    grpo_entropy_coef: float = knob(0.0, "weight of an entropy bonus", only=GRPO)
    grpo_minibatches_per_rollout: int = knob(
        1, "optimizer steps that share one rollout, each on its own part", only=GRPO
    )
    grpo_ppo_epochs: int = knob(1, "passes over each rollout", only=GRPO)
    grpo_dynamic_sampling_rounds: int = knob(
        0,
        "rounds in which groups whose samples are all right or all wrong are replaced by fresh ones (dynamic sampling)",
        only=GRPO,
    )
    grpo_truncated: str = knob(
        "keep",
        "samples that did not stop: train on them, or mask them (no loss, and no part of any divisor)",
        only=GRPO,
        choices=("keep", "mask"),
    )
    grpo_truncation_penalty: float = knob(0.0, "what such a sample loses of its reward", only=GRPO)
    grpo_length_penalty: int = knob(
        0, "over this many last tokens a sample loses up to 1 (soft length penalty)", only=GRPO
    )
    grpo_tis: str = knob(
        "none",
        "importance weights for the sampler's rounding: none, cut at the cap, or masked outside it",
        only=GRPO,
        choices=("none", "truncate", "mask"),
    )
    grpo_tis_cap: float = knob(2.0, "that cap", only=GRPO | {"grpo_tis": ("truncate", "mask")})
    grpo_kd_coef: float = knob(
        0.0, "weight of a divergence from --teacher on the samples", only=GRPO
    )

    eval_every: int = knob(250, "steps between evaluations; 0: before and after only")
    eval_examples: int = knob(
        400, "held-out examples, carved from the training data; 0: no evaluation"
    )
    eval_tokens: int = knob(96, "new tokens at most per answer")
    save_every: int = knob(250, "steps between checkpoints; 0: after the last step only")
    max_checkpoints: int = knob(2, "checkpoints kept")
    log_every: int = knob(50, "steps between progress lines; metrics.jsonl gets every step")
    activation_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, a third more time"
    )
    kernels: str = knob(
        "auto",
        "fused operations: Triton on a GPU and PyTorch elsewhere, or one of them",
        choices=CHOICES,
    )
    compile: bool = knob(False, "torch.compile the transformer's blocks")
    wandb: str = knob("off", "Weights & Biases", choices=("off", "offline", "online"))
    wandb_project: str = knob("srlm", "its project", only={"wandb": ("offline", "online")})


def check(cfg):
    """Refuse settings that cannot work, before anything is read."""

    def need(ok, message):
        if not ok:
            raise UserError(message)

    positive = (
        "batch_size",
        "micro_batch_tokens",
        "eval_tokens",
        "max_checkpoints",
        "log_every",
        "max_skipped",
        "kd_topk",
        "sample_tokens",
        "sample_batch",
    )
    for name in (*positive, "grpo_samples", "grpo_minibatches_per_rollout", "grpo_ppo_epochs"):
        need(getattr(cfg, name) > 0, f"--{name} must be at least 1")
    natural = (
        "seed",
        "steps",
        "warmup",
        "max_grad_norm",
        "weight_decay",
        "eval_every",
        "eval_examples",
        "save_every",
        "train_examples",
        "show_batch",
    )
    for name in (
        *natural,
        "sample_top_k",
        "sample_log",
        "grpo_kl_coef",
        "grpo_dynamic_sampling_rounds",
        "grpo_truncation_penalty",
        "grpo_length_penalty",
        "grpo_kd_coef",
        "lora_rank",
    ):
        need(getattr(cfg, name) >= 0, f"--{name} must not be negative")
    need(cfg.seed < 2**63, "--seed must be below 2^63")
    need(cfg.lr > 0 and math.isfinite(cfg.lr), "--lr must be a positive number")
    need(cfg.steps or 0 < cfg.epochs < math.inf, "--epochs must be positive")
    need(
        0 <= cfg.beta1 < 1 and 0 <= cfg.beta2 < 1 and cfg.eps > 0,
        "--beta1 and --beta2 must be in [0, 1), --eps positive",
    )
    need(0 <= cfg.lr_floor <= 1, "--lr_floor must be between 0 and 1")
    need(0 < cfg.lora_alpha < math.inf, "--lora_alpha must be a positive number")
    need(0 <= cfg.lora_dropout < 1, "--lora_dropout must be at least 0 and below 1")
    parse_targets(cfg.lora_targets)
    need(cfg.kd_temperature > 0, "--kd_temperature must be positive")
    need(0 <= cfg.kd_ce <= 1, "--kd_ce must be between 0 and 1")
    need(0 <= cfg.kd_beta <= 1, "--kd_beta must be between 0 and 1")
    check_divergence(cfg, need)
    need(not cfg.resume or cfg.name, "--resume needs the --name of a run")
    need(
        cfg.device != "cuda" or torch.cuda.is_available(),
        "--device cuda: this machine offers no CUDA device",
    )
    need(0 <= cfg.kd_mix <= 1, "--kd_mix must be between 0 and 1")
    need(
        0 < cfg.sample_temperature < math.inf,
        "--sample_temperature must be positive: samples of one prompt must differ",
    )
    need(0 < cfg.sample_top_p <= 1, "--sample_top_p must be above 0 and at most 1")
    plain = cfg.sample_top_p == 1 and cfg.sample_top_k == 0
    need(
        plain or cfg.mode != "grpo",
        "--sample_top_k and --sample_top_p change who samples: grpo trains on the whole distribution",
    )
    if cfg.mode == "kd" and cfg.kd_signal == "sampled":
        need(
            cfg.kd_prefix == "student",
            "--kd_signal sampled needs --kd_prefix student: its expectation is over the student's own tokens",
        )
        alone = cfg.kd_mix == 1 and cfg.kd_ce == 0 and not cfg.kd_t_squared and plain
        need(
            alone,
            "--kd_signal sampled takes no --kd_mix, --kd_ce, --kd_t_squared, --sample_top_k or --sample_top_p",
        )
        need(
            cfg.kd_divergence == "reverse_kl" and cfg.kd_temperature == cfg.sample_temperature,
            "--kd_signal sampled is the reverse KL at the sampling temperature: set --kd_divergence reverse_kl and equal temperatures",
        )
    if cfg.mode == "grpo":
        need(
            cfg.grpo_samples > 1,
            "--grpo_samples must be at least 2: an advantage compares the samples of a prompt",
        )
        whole = cfg.batch_size % cfg.grpo_samples == 0
        need(
            whole,
            f"--batch_size {cfg.batch_size} samples are no whole groups of --grpo_samples {cfg.grpo_samples}",
        )
        need(
            0 < cfg.grpo_clip_low <= 1 and cfg.grpo_clip_high > 0,
            "--grpo_clip_low must be in (0, 1], --grpo_clip_high positive",
        )
        need(cfg.grpo_tis_cap >= 1, "--grpo_tis_cap must be at least 1")
        need(
            cfg.show_batch == 0,
            "--show_batch shows data; grpo trains on samples (see samples.jsonl of a run)",
        )
        need(
            cfg.grpo_length_penalty <= cfg.sample_tokens,
            "--grpo_length_penalty must not exceed --sample_tokens",
        )
        check_kl_estimate(cfg, need)


def check_divergence(cfg, need):
    """Refuse a divergence that teaches nothing, and cross-entropy on the student's own text."""
    has_divergence = cfg.mode == "kd" or cfg.mode == "grpo" and cfg.grpo_kd_coef > 0
    skew_is_zero = cfg.kd_divergence.startswith("skew") and cfg.kd_beta == 1
    need(
        not (has_divergence and skew_is_zero),
        f"--kd_beta 1 makes {cfg.kd_divergence} zero everywhere; choose one below 1",
    )
    own_text = cfg.mode == "kd" and cfg.kd_prefix == "student" and cfg.kd_mix > 0
    need(
        not own_text or cfg.kd_signal == "sampled" or cfg.kd_ce == 0,
        "--kd_ce with --kd_prefix student would teach the student to repeat what it wrote itself, "
        "right or wrong; set --kd_ce 0, or --kd_prefix data or teacher",
    )


def check_kl_estimate(cfg, need):
    """Refuse estimates whose gradient is not that of a KL where --grpo_kl_in puts them.

    losses/grpo.py says what each estimate's gradient is.
    """
    if cfg.grpo_kl_coef == 0:
        return
    need(
        cfg.grpo_kl_in == "loss" or cfg.grpo_kl_estimator == "k1",
        f"--grpo_kl_estimator {cfg.grpo_kl_estimator} in the reward drives the policy away from its reference "
        "(arXiv 2510.01555, 2512.21852); set --grpo_kl_estimator k1, or --grpo_kl_in loss",
    )
    need(
        cfg.grpo_kl_in == "reward" or cfg.grpo_kl_estimator != "k1",
        "--grpo_kl_estimator k1 in the loss has a gradient that is 0 on average (arXiv 2510.01555, "
        "2512.21852); set --grpo_kl_estimator k3 or k2, or --grpo_kl_in reward",
    )


def needs_old_logp(cfg):
    """Whether a run compares the policy's log-probs with those that it had when it sampled: a
    rollout serves several updates, the sampler's rounding is corrected, or what is read off the
    log-probs of the rollout (a KL in the reward, a teacher's signal) becomes an advantage."""
    if cfg.mode == "grpo":
        several_updates = cfg.grpo_minibatches_per_rollout * cfg.grpo_ppo_epochs > 1
        kl_in_reward = cfg.grpo_kl_coef > 0 and cfg.grpo_kl_in == "reward"
        return several_updates or cfg.grpo_tis != "none" or kl_in_reward
    return cfg.mode == "kd" and cfg.kd_signal == "sampled"


def kept(stored):
    """The knobs that say which model is trained on which stream: a run that is resumed keeps them as `stored`."""
    names = [
        "mode",
        "model",
        "tokenizer",
        "seed",
        "data",
        "train_examples",
        "max_length_policy",
        "batch_size",
        "weighting",
    ]
    names += [
        "template",
        "system_prompt",
        "prompt_suffix",
        "chat_template_kwargs",
        "lora_rank",
        "lora_alpha",
        "lora_rslora",
        "lora_targets",
    ]
    names += [
        "kd_prefix",
        "kd_mix",
        "kd_signal",
        "reference",
        "grpo_samples",
        "grpo_minibatches_per_rollout",
        "grpo_ppo_epochs",
    ]
    if (
        stored.get("grpo_minibatches_per_rollout", 1) * stored.get("grpo_ppo_epochs", 1) > 1
    ):  # unspent samples were scored and weighted by these
        names += [
            "sample_temperature",
            "grpo_variant",
            "grpo_kl_coef",
            "grpo_kl_in",
            "grpo_tis",
            "grpo_kd_coef",
            "teacher",
        ]
    names += (
        ["micro_batch_tokens"] if stored.get("max_length_policy") == "drop" else []
    )  # it says what is dropped
    return (
        names if task_of(str(stored.get("data"))) else [*names, "eval_examples"]
    )  # held-out examples are carved from a file
