"""Train a small reasoning language model by SFT, distillation (KD) or GRPO.

    python train.py --mode kd
    python train.py --config recipes/sft_gsm8k_0.5b.toml --lr 1e-5
    torchrun --standalone --nproc_per_node=8 train.py --config recipes/grpo_gsm8k_0.5b_paper.toml

Without other options a run trains a tiny model on the toy task, in minutes on a CPU; recipes/ holds
the options for real models. An option that the chosen mode does not read is refused.
"""

import dataclasses
from typing import Any

import torch

from data.batch import WEIGHTINGS
from data.dataset import task_of
from errors import UserError
from kernels.backend import CHOICES
from losses.grpo import KL_ESTIMATES, VARIANTS
from losses.kd import DIVERGENCES, WITH_BETA
from model.lora import parse_targets
from options import ABOVE_0, Condition, Values, option
from rl.advantage import BASELINES
from rl.reward import PARTS

KD: Condition = {"mode": ("kd",)}
GRPO: Condition = {"mode": ("grpo",)}
WITH_TEACHER = [KD, {"grpo_kd_coef": ABOVE_0}]
GENERATED: Condition = {"kd_prefix": ("student", "teacher")}


def in_grpo(default: Any) -> dict[str, Values]:
    """Return the `default_when` of an option that has another default in grpo."""
    return {"mode": {"grpo": default}}


def reuses_rollouts(stored: Values) -> bool:
    """Return whether a rollout serves several updates: its samples may wait in a checkpoint, with
    the log-probs and weights that they got under the options that the run began with."""
    minibatches = stored.get("grpo_minibatches_per_rollout", 1)
    return minibatches * stored.get("grpo_ppo_epochs", 1) > 1


def drops_long_examples(stored: Values) -> bool:
    """Return whether --micro_batch_tokens decides which examples are trained on."""
    return stored.get("max_length_policy") == "drop"


def carves_validation(stored: Values) -> bool:
    """Return whether validation examples are taken from the training data: a task has its own."""
    return not task_of(str(stored.get("data")))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option of train.py. The defaults are those of the toy task."""

    # Which options a run reads follows from their names, unless `read_when` says otherwise.
    read_when_prefix = {
        "kd_": KD,
        "grpo_": GRPO,
        "sample_": [GRPO, GENERATED],
        "lora_": {"lora_rank": ABOVE_0},
    }

    mode: str = option(
        "kd", "training method", section="Run", choices=("sft", "kd", "grpo"), fixed_on_resume=True
    )
    model: str = option(
        "tiny",
        "model to train: a checkpoint folder, a hub id, or a preset with random weights; "
        "tiny in grpo: distilled on the toy task first",
        fixed_on_resume=True,
    )
    tokenizer: str = option(
        "",
        "folder with tokenizer.json; empty: the tokenizer of the model, of the teacher, or of the "
        "toy task",
        fixed_on_resume=True,
    )
    name: str = option("", "name of the run's folder under --runs; empty: a new unique name")
    runs: str = option("runs", "folder that holds all runs")
    resume: bool = option(False, "continue the run --name from its newest checkpoint")
    seed: int = option(
        0,
        "random seed of data order, sampling and random weights",
        minimum=0,
        maximum=2**63 - 1,
        fixed_on_resume=True,
    )
    device: str = option(
        "auto", "device; auto: cuda where there is a GPU", choices=("auto", "cpu", "cuda")
    )
    dtype: str = option(
        "auto",
        "dtype of activations; auto: bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float64"),
    )

    data: str = option(
        "word_problems:800",
        "training data: a task (endless, or with :800 its first 800 problems), a .jsonl, .json or "
        ".parquet file, a folder, or org/name/file of a hub dataset",
        section="Data",
        default_when=in_grpo("word_problems"),
        fixed_on_resume=True,
    )
    train_examples: int = option(
        0,
        "train on the first examples of the data only, this many; 0: on all",
        minimum=0,
        fixed_on_resume=True,
    )
    template: str = option(
        "auto",
        "how examples become text; auto: chat if the tokenizer has a chat template",
        choices=("auto", "chat", "plain"),
        fixed_on_resume=True,
    )
    system_prompt: str = option(
        "",
        "system prompt of conversations that have none; some chat templates bring their own",
        fixed_on_resume=True,
    )
    prompt_suffix: str = option("", "text appended to every question", fixed_on_resume=True)
    chat_template_kwargs: str = option(
        "",
        "arguments of the chat template, as in enable_thinking=false, or a JSON object",
        fixed_on_resume=True,
    )
    max_length_policy: str = option(
        "error",
        "what to do with an example longer than --micro_batch_tokens",
        choices=("error", "drop"),
        fixed_on_resume=True,
    )
    show_batch: int = option(
        0,
        "print this many examples of the first batch, with the trained tokens marked, and stop",
        minimum=0,
    )

    steps: int = option(
        1000,
        "optimizer steps; 0: computed from --epochs",
        section="Optimisation",
        minimum=0,
        default_when=in_grpo(200),
    )
    epochs: float = option(1.0, "passes over the training data", above=0, read_when={"steps": (0,)})
    batch_size: int = option(
        32,
        "examples (in grpo: samples) per optimizer step, over all ranks",
        minimum=1,
        default_when=in_grpo(128),
        fixed_on_resume=True,
    )
    micro_batch_tokens: int = option(
        8192,
        "maximum tokens per forward pass, and so of an example",
        minimum=1,
        fixed_on_resume=drops_long_examples,
    )
    weighting: str = option(
        "token",
        "what counts the same in the loss: every token, or every sequence",
        choices=WEIGHTINGS,
        read_when={"mode": ("sft", "kd")},
        fixed_on_resume=True,
    )
    lr: float = option(5e-3, "peak learning rate", above=0, default_when=in_grpo(3e-4))
    warmup: int = option(20, "steps of linear learning-rate warm-up", minimum=0)
    schedule: str = option(
        "cosine",
        "learning-rate schedule after the warm-up",
        choices=("constant", "linear", "cosine"),
        default_when=in_grpo("linear"),
    )
    lr_floor: float = option(
        0.1,
        "learning rate at the last step, as a fraction of the peak",
        minimum=0,
        maximum=1,
        read_when={"schedule": ("linear", "cosine")},
    )
    beta1: float = option(0.9, "AdamW's decay of the first moment", minimum=0, below=1)
    beta2: float = option(0.98, "AdamW's decay of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = option(
        0.3,
        "AdamW's weight decay, of matrices only: not of norms, biases or embeddings",
        minimum=0,
        default_when=in_grpo(0.0),
    )
    max_grad_norm: float = option(
        1.0, "clip the global gradient norm to this value; 0: no clipping", minimum=0
    )
    max_skipped: int = option(
        5, "stop after this many steps in a row without a finite gradient", minimum=1
    )

    lora_rank: int = option(
        0,
        "rank of LoRA adapters beside the frozen model; 0: train the model's own weights",
        section="LoRA",
        minimum=0,
        read_when=[],
        fixed_on_resume=True,
    )
    lora_alpha: float = option(
        32.0,
        "LoRA's alpha: an adapter's output is scaled by alpha / rank",
        above=0,
        fixed_on_resume=True,
    )
    lora_rslora: bool = option(
        False, "scale adapters by alpha / sqrt(rank) instead (rsLoRA)", fixed_on_resume=True
    )
    lora_targets: str = option(
        "all",
        "linear layers that get an adapter, as in q_proj,v_proj; all: the seven projections",
        fixed_on_resume=True,
    )
    lora_dropout: float = option(
        0.0,
        "dropout on the inputs of adapters; off where log-probs are compared with a rollout's",
        minimum=0,
        below=1,
    )

    teacher: str = option(
        "",
        "teacher: a checkpoint folder, a hub id or a preset; empty: the toy task's teacher, "
        "trained on first use",
        section="Teacher and distillation",
        read_when=WITH_TEACHER,
        fixed_on_resume=reuses_rollouts,
    )
    kd_divergence: str = option(
        "forward_kl",
        "divergence between teacher and student",
        choices=DIVERGENCES,
        read_when=WITH_TEACHER,
        default_when=in_grpo("reverse_kl"),
    )
    kd_beta: float = option(
        0.5,
        "mixture weight: of the teacher in jsd and skew_forward_kl, of the student in "
        "skew_reverse_kl",
        minimum=0,
        maximum=1,
        read_when={"kd_divergence": WITH_BETA},
    )
    kd_temperature: float = option(
        2.0, "temperature that divides the logits of teacher and student", above=0
    )
    kd_t_squared: bool = option(False, "multiply the divergence by the squared --kd_temperature")
    kd_ce: float = option(
        0.0,
        "weight of cross-entropy in the loss; the divergence has the rest",
        minimum=0,
        maximum=1,
    )
    kd_prefix: str = option(
        "data",
        "source of the text that is trained on: the data, or generated by student or teacher",
        choices=("data", "student", "teacher"),
        fixed_on_resume=True,
    )
    kd_mix: float = option(
        1.0,
        "fraction of steps on generated text; the other steps are on the data",
        minimum=0,
        maximum=1,
        read_when=GENERATED,
        fixed_on_resume=True,
    )
    kd_signal: str = option(
        "full",
        "what is learned from the teacher: its full distribution, its top-k probabilities with a "
        "bucket for the rest, or the log-prob of the sampled token as an advantage",
        choices=("full", "topk", "sampled"),
        fixed_on_resume=True,
    )
    kd_topk: int = option(
        64,
        "number of teacher probabilities per token in the top-k signal",
        minimum=1,
        read_when={"kd_signal": ("topk",)},
    )
    kd_cache: str = option(
        "",
        "folder that keeps the teacher's top-k for all the data, filled on first use; after that "
        "no teacher is loaded",
        read_when={"kd_signal": ("topk",), "kd_prefix": ("data",)},
    )

    sample_tokens: int = option(64, "maximum new tokens per sample", section="Sampling", minimum=1)
    sample_temperature: float = option(
        1.0,
        "sampling temperature, and in grpo that of all log-probs; above 0 because the samples of a "
        "prompt must differ",
        above=0,
        fixed_on_resume=reuses_rollouts,
    )
    sample_top_k: int = option(
        0, "sample from this many most probable tokens; 0: from all", minimum=0
    )
    sample_top_p: float = option(
        1.0, "sample from the most probable tokens with this total mass", above=0, maximum=1
    )
    sample_batch: int = option(256, "sequences generated at once, per rank", minimum=1)
    sample_log: int = option(
        8, "samples of each rollout written to samples.jsonl", minimum=0, read_when=GRPO
    )

    grpo_variant: str = option(
        "token",
        "loss, with the advantage and clip bounds of its paper; grpo: DeepSeekMath, token: DAPO",
        section="GRPO",
        choices=VARIANTS,
        fixed_on_resume=reuses_rollouts,
    )
    grpo_samples: int = option(
        8,
        "samples per prompt, at least 2: an advantage compares the samples of a prompt",
        minimum=2,
        fixed_on_resume=True,
    )
    grpo_reward: str = option(
        "accuracy",
        f"reward: parts with weights ({', '.join(PARTS)}), as in accuracy,format:0.5; or a "
        "function, path/to/file.py:function",
    )
    grpo_advantage: str = option(
        "std",
        "how the advantages of a prompt's samples are computed from their rewards",
        choices=BASELINES,
        default_when={"grpo_variant": {"dr_grpo": "mean"}},
    )
    grpo_clip_low: float = option(
        0.2,
        "the policy ratio is clipped below at 1 minus this value; 1: no lower bound",
        above=0,
        maximum=1,
        default_when={"grpo_variant": {"gspo": 3e-4, "cispo": 1.0}},
    )
    grpo_clip_high: float = option(
        0.2,
        "the policy ratio is clipped above at 1 plus this value",
        above=0,
        default_when={"grpo_variant": {"token": 0.28, "gspo": 4e-4}},
    )
    grpo_kl_coef: float = option(
        0.0,
        "weight of the KL to the reference model; 0: no reference model is loaded",
        minimum=0,
        fixed_on_resume=reuses_rollouts,
    )
    reference: str = option(
        "",
        "reference model: a checkpoint folder, a hub id or a preset; empty: the policy at its "
        "start",
        read_when={"grpo_kl_coef": ABOVE_0},
        fixed_on_resume=True,
    )
    grpo_kl_in: str = option(
        "loss",
        "where the KL to the reference is: a term of the loss, or subtracted from the reward",
        choices=("loss", "reward"),
        read_when={"grpo_kl_coef": ABOVE_0},
        fixed_on_resume=reuses_rollouts,
    )
    grpo_kl_estimator: str = option(
        "k3",
        "estimator of the KL to the reference: k2 or k3 in the loss, k1 in the reward",
        choices=KL_ESTIMATES,
        read_when={"grpo_kl_coef": ABOVE_0},
        default_when={"grpo_kl_in": {"reward": "k1"}},
    )
    grpo_entropy_coef: float = option(0.0, "weight of the entropy bonus")
    grpo_minibatches_per_rollout: int = option(
        1,
        "optimizer steps per pass over a rollout, each on a part",
        minimum=1,
        fixed_on_resume=True,
    )
    grpo_ppo_epochs: int = option(1, "passes over each rollout", minimum=1, fixed_on_resume=True)
    grpo_dynamic_sampling_rounds: int = option(
        0,
        "dynamic sampling: rounds in which groups of equal rewards are replaced by new prompts",
        minimum=0,
    )
    grpo_mask_truncated: bool = option(
        False, "samples that did not stop carry no loss and count in no divisor"
    )
    grpo_truncation_penalty: float = option(
        0.0, "subtracted from the reward of a sample that did not stop", minimum=0
    )
    grpo_length_penalty: int = option(
        0,
        "soft length penalty: within this many tokens of --sample_tokens the reward falls by up "
        "to 1",
        minimum=0,
    )
    grpo_tis: str = option(
        "none",
        "importance weights that correct the sampler's rounding: none, truncated at "
        "--grpo_tis_cap, or masked beyond it",
        choices=("none", "truncate", "mask"),
        fixed_on_resume=reuses_rollouts,
    )
    grpo_tis_cap: float = option(
        2.0,
        "largest importance weight of --grpo_tis",
        minimum=1,
        read_when={"grpo_tis": ("truncate", "mask")},
    )
    grpo_kd_coef: float = option(
        0.0,
        "weight of a divergence from --teacher on the samples",
        minimum=0,
        fixed_on_resume=reuses_rollouts,
    )

    eval_every: int = option(
        250,
        "steps between evaluations; 0: before the first and after the last step only",
        section="Evaluation and checkpoints",
        minimum=0,
    )
    eval_examples: int = option(
        400,
        "number of validation examples, set apart from the training data; 0: no evaluation",
        minimum=0,
        fixed_on_resume=carves_validation,
    )
    eval_tokens: int = option(96, "maximum new tokens per answer in evaluations", minimum=1)
    save_every: int = option(
        250, "steps between checkpoints; 0: after the last step only", minimum=0
    )
    max_checkpoints: int = option(2, "number of newest checkpoints that are kept", minimum=1)
    log_every: int = option(
        50, "steps between progress lines; metrics.jsonl gets every step", minimum=1
    )
    activation_checkpointing: bool = option(
        False,
        "recompute activations in the backward pass: less memory, a third more time",
        section="System",
    )
    kernels: str = option(
        "auto",
        "implementation of the fused operations; auto: Triton on a GPU, PyTorch elsewhere",
        choices=CHOICES,
    )
    compile: bool = option(False, "torch.compile the transformer's blocks")
    wandb: str = option("off", "log to Weights & Biases", choices=("off", "offline", "online"))
    wandb_project: str = option(
        "srlm", "project in Weights & Biases", read_when={"wandb": ("offline", "online")}
    )


def needs_old_logp(cfg: Config) -> bool:
    """Return whether the policy's log-probs are recomputed when it has sampled.

    They are compared with later ones where a rollout serves several updates or the sampler's
    rounding is corrected, and become part of the advantage where a KL is subtracted from the reward
    or the teacher's signal is its log-prob.
    """
    if cfg.mode == "grpo":
        several_updates = cfg.grpo_minibatches_per_rollout * cfg.grpo_ppo_epochs > 1
        kl_in_reward = cfg.grpo_kl_coef > 0 and cfg.grpo_kl_in == "reward"
        return several_updates or cfg.grpo_tis != "none" or kl_in_reward
    return cfg.mode == "kd" and cfg.kd_signal == "sampled"


# --- what must hold between options --------------------------------------------------------------


def validate(cfg: Config) -> None:
    """Refuse options that do not work together, before anything is read. Raises UserError."""
    parse_targets(cfg.lora_targets)
    _need(not cfg.resume or cfg.name, "--resume needs the --name of a run")
    _need(
        cfg.device != "cuda" or torch.cuda.is_available(),
        "--device cuda: this machine offers no CUDA device",
    )
    if cfg.mode == "kd":
        _validate_kd(cfg)
    if cfg.mode == "grpo":
        _validate_grpo(cfg)
    if cfg.mode == "grpo" and cfg.grpo_kl_coef > 0:
        _validate_kl(cfg)
    has_divergence = cfg.mode == "kd" or (cfg.mode == "grpo" and cfg.grpo_kd_coef > 0)
    is_zero = cfg.kd_divergence.startswith("skew") and cfg.kd_beta == 1
    _need(
        not (has_divergence and is_zero),
        f"--kd_beta 1 makes {cfg.kd_divergence} zero everywhere; choose one below 1",
    )


def _need(holds: object, message: str) -> None:
    if not holds:
        raise UserError(message)


def _validate_kd(cfg: Config) -> None:
    if cfg.kd_signal == "sampled":
        _need(
            cfg.kd_prefix == "student",
            "--kd_signal sampled needs --kd_prefix student: its expectation is over the student's "
            "own tokens",
        )
        plain = cfg.sample_top_p == 1 and cfg.sample_top_k == 0
        _need(
            plain and cfg.kd_mix == 1 and cfg.kd_ce == 0 and not cfg.kd_t_squared,
            "--kd_signal sampled takes no --kd_mix, --kd_ce, --kd_t_squared, --sample_top_k or "
            "--sample_top_p; leave them out",
        )
        _need(
            cfg.kd_divergence == "reverse_kl" and cfg.kd_temperature == cfg.sample_temperature,
            "--kd_signal sampled is the reverse KL at the sampling temperature: set "
            "--kd_divergence reverse_kl and equal temperatures",
        )
    elif cfg.kd_prefix == "student" and cfg.kd_mix > 0:
        _need(
            cfg.kd_ce == 0,
            "--kd_ce with --kd_prefix student would teach the student to repeat its own text, "
            "right or wrong; set --kd_ce 0, or --kd_prefix data or teacher",
        )


def _validate_grpo(cfg: Config) -> None:
    _need(
        cfg.sample_top_p == 1 and cfg.sample_top_k == 0,
        "--sample_top_k and --sample_top_p change who samples: grpo trains on the whole "
        "distribution; leave them out",
    )
    _need(
        cfg.batch_size % cfg.grpo_samples == 0,
        f"--batch_size {cfg.batch_size} samples are no whole groups of --grpo_samples "
        f"{cfg.grpo_samples}; choose a multiple",
    )
    _need(
        cfg.show_batch == 0,
        "--show_batch shows data; grpo trains on samples (see samples.jsonl of a run)",
    )
    _need(
        cfg.grpo_length_penalty <= cfg.sample_tokens,
        "--grpo_length_penalty must not exceed --sample_tokens",
    )


def _validate_kl(cfg: Config) -> None:
    """Refuse estimators whose gradient is not that of a KL where --grpo_kl_in puts them.

    losses/grpo.py says what each estimator's gradient is.
    """
    _need(
        cfg.grpo_kl_in == "loss" or cfg.grpo_kl_estimator == "k1",
        f"--grpo_kl_estimator {cfg.grpo_kl_estimator} in the reward drives the policy away from "
        "its reference (arXiv 2510.01555, 2512.21852); set --grpo_kl_estimator k1, or "
        "--grpo_kl_in loss",
    )
    _need(
        cfg.grpo_kl_in == "reward" or cfg.grpo_kl_estimator != "k1",
        "--grpo_kl_estimator k1 in the loss has a gradient that is 0 on average (arXiv "
        "2510.01555, 2512.21852); set --grpo_kl_estimator k3 or k2, or --grpo_kl_in reward",
    )
