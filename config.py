"""Train a small reasoning language model by SFT, distillation (KD) or GRPO.

    python train.py --mode kd
    python train.py --config recipes/sft_gsm8k_0.5b.toml --lr 1e-5
    torchrun --standalone --nproc_per_node=8 train.py --config recipes/grpo_gsm8k_0.5b_paper.toml

The defaults train a tiny model on the toy task, in minutes on a CPU. Another --model brings those
of pretrained models (--defaults); recipes/ has options that were chosen for some. `--dry_run` says
what a run would do. An option that the run would not read is refused.
"""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

import plugins
import tracking
from data.batch import WEIGHTINGS
from data.dataset import task_of
from errors import UserError
from files import read_json
from kernels.backend import CHOICES
from losses.grpo import KL_ESTIMATORS, VARIANTS, clipped_variants
from losses.kd import DIVERGENCES, WITH_BETA
from model.lora import parse_targets
from model.presets import PRESETS, RANDOM
from options import ABOVE_0, Condition, Values, option, turned_round
from rl.advantage import ADVANTAGES
from rl.reward import PARTS
from run import newest_checkpoint

GRPO: Condition = {"mode": ("grpo",)}
TEACHING: Condition = {"kd_signal": ("full", "topk", "student_topk", "draws", "sampled")}
WITH_TEACHER: list[Condition] = [TEACHING, {"grpo_kd_coef": ABOVE_0}]
AVERAGE = "self_average"  # values of --teacher: the policy as it began, or as a moving average
SELF = ("self", AVERAGE)
WITH_REFERENCE: Condition = {"grpo_kl_coef": ABOVE_0}
GENERATED: Condition = {"kd_prefix": ("student", "teacher")}
OWN_TOKENS = ("sampled", "unlikely")  # signals of --kd_signal that are advantages of samples
CLIPPED: Condition = {"grpo_variant": clipped_variants}
TOPK: Condition = {"kd_signal": ("topk", "student_topk")}
DRAWS: Condition = {"kd_signal": ("draws",)}
TRACKED: Condition = {"wandb": ("offline", "online")}
SAVED: Condition = {"save": ("every", "best")}
DISTRIBUTION: Condition = {"kd_signal": ("full", "topk", "student_topk")}


TOY_VOCABULARY = 1000  # the toy task's models have fewer ids, and no other has


def in_grpo(default: Any) -> dict[Any, Any]:
    """Return the `default_when` of an option that has another default in grpo."""
    return {"mode": {"grpo": default}}


def for_pretrained(default: Any, in_grpo: Any) -> dict[Any, Any]:
    """Return the `default_when` of one with others for pretrained models, in grpo and else."""
    by_both = {("grpo", "pretrained"): in_grpo}
    return {"defaults": {"pretrained": default}, ("mode", "defaults"): by_both}


def whose_defaults(model: str) -> str:
    """Return "toy" if a model is one of the toy task's, a preset or a folder, else "pretrained"."""
    preset = PRESETS.get(model.removeprefix(RANDOM))
    if preset:
        return "toy" if preset.vocab_size < TOY_VOCABULARY else "pretrained"
    try:
        folder = Path(newest_checkpoint(model, "--model"))
        if folder.name == "adapter":  # of a run's checkpoint
            folder = folder.parent
        is_toy = read_json(folder / "config.json")["vocab_size"] < TOY_VOCABULARY
    except (OSError, UserError, KeyError, TypeError):
        is_toy = False  # what is wrong with the folder is said when it is read
    return "toy" if is_toy else "pretrained"


# What to write in place of names that people know from other programs.
HINTS = turned_round(
    {
        "--lr": "learning_rate",
        "--lr_floor": "min_lr_ratio final_lr_frac",
        "--schedule": "lr_scheduler_type",
        "--warmup": "warmup_steps",
        "--warmup, in steps": "warmup_ratio",
        "--optimizer": "optim",
        "--beta1": "adam_beta1",
        "--beta2": "adam_beta2",
        "--eps": "adam_epsilon",
        "--max_grad_norm": "grad_clip",
        "--batch_size, of a whole step, all devices together": "per_device_train_batch_size "
        "train_batch_size per_device_batch_size device_batch_size",
        "--batch_size, of a whole step, and micro-batches are cut by "
        "--micro_batch_tokens": "gradient_accumulation_steps",
        "--batch_size, in examples": "total_batch_size",
        "--micro_batch_tokens": "max_length max_seq_length max_seq_len max_prompt_length",
        "--epochs": "num_train_epochs num_epochs total_epochs",
        "--steps": "max_steps total_training_steps",
        "--model": "model_name_or_path path",
        "--teacher": "teacher_model_name_or_path",
        "--data": "dataset_name train_file train_files",
        "--eval_data": "val_files validation_file eval_dataset",
        "--seed": "data_seed seed_data",
        "--sample_temperature, or --kd_temperature for that of the divergence": "temperature",
        "--sample_top_p": "top_p",
        "--sample_top_k, or --kd_topk for the teacher's": "top_k",
        "--sample_tokens": "max_completion_length max_new_tokens max_response_length",
        "--kd_divergence": "divergence",
        "--kd_mix": "lmbda",
        "--kd_ce, the part of the cross-entropy, or --lora_alpha": "alpha",
        "--grpo_kl_coef, the weight of the KL to the reference, or --kd_beta, of a mixture": "beta",
        "--grpo_kl_coef": "kl_coef kl_loss_coef",
        "--grpo_variant": "loss_type",
        "--grpo_samples": "num_generations n",
        "--grpo_ppo_epochs": "ppo_epochs",
        "--grpo_ppo_epochs, or --steps, the number of optimizer steps": "num_iterations",
        "--grpo_clip_low and --grpo_clip_high": "epsilon clip_ratio",
        "--grpo_clip_high": "epsilon_high",
        "--grpo_entropy_coef": "entropy_coeff",
        "--grpo_advantage std or mean": "scale_rewards",
        "--grpo_mask_truncated": "mask_truncated_completions",
        "--grpo_reward": "reward_funcs",
        "--grpo_reward, as in accuracy,format:0.5": "reward_weights",
        "--lora_rank": "lora_r",
        "--lora_rank above 0": "use_peft",
        "--lora_targets": "lora_target_modules",
        "--runs, the folder of all runs, and --name": "output_dir",
        "--name": "run_name experiment_name",
        "--resume, with --name": "resume_from_checkpoint",
        "--log_every": "logging_steps",
        "--eval_every": "eval_steps eval_strategy test_freq",
        "--save": "save_strategy",
        "--save_every": "save_steps save_freq",
        "--max_checkpoints": "save_total_limit",
        "--dtype": "torch_dtype",
        "--dtype bfloat16": "bf16 fp16",
        "--activation_checkpointing": "gradient_checkpointing",
        "--shard on, with torchrun": "deepspeed fsdp",
        "--wandb": "report_to",
        "--wandb_project": "project_name",
        "nothing: samples are generated in the same process": "use_vllm",
        "nothing: weights are not quantised; --lora_rank saves memory": "load_in_4bit",
    }
)


def if_rollout_is_reused(stored: Values) -> bool:
    """Return whether rollouts serve several updates: their samples may wait in a checkpoint, with
    log-probs and weights that depend on the options."""
    minibatches = stored.get("grpo_minibatches_per_rollout", 1)
    return minibatches * stored.get("grpo_ppo_epochs", 1) > 1


def if_dropping(stored: Values) -> bool:
    """Return whether --micro_batch_tokens decides which examples are trained on."""
    return stored.get("max_length_policy") == "drop"


def if_carved(stored: Values) -> bool:
    """Return whether validation examples are taken from the training data: a task has its own."""
    return not task_of(str(stored.get("data")))


@dataclasses.dataclass(frozen=True)
class Config:
    """Every option of train.py; the defaults are those of the toy task."""

    sections = {
        "mode": "Run",
        "data": "Data",
        "optimizer": "Optimisation",
        "lora_rank": "LoRA",
        "teacher": "Teacher and distillation",
        "sample_tokens": "Sampling",
        "grpo_variant": "GRPO",
        "eval_every": "Evaluation and checkpoints",
        "activation_checkpointing": "System",
    }
    hints = HINTS
    before = {"optimizer": "adamw"}  # runs that do not say it
    # Names say which options a run reads, unless an option says it with `read_when`.
    read_when_prefix = {
        "kd_": {"mode": ("kd",)},
        "grpo_kl_": WITH_REFERENCE,
        "grpo_": GRPO,
        "sample_": [GRPO, GENERATED],
        "lora_": {"lora_rank": ABOVE_0},
    }

    mode: Literal["sft", "kd", "grpo"] = option("kd", "training method", fixed=True)
    model: str = option(
        "tiny",
        "model to train: a folder, hub id or preset; tiny in grpo: distilled on the toy task first",
        fixed=True,
    )
    defaults: Literal["toy", "pretrained"] = option(
        "toy",
        "whose defaults hold; pretrained unless --model is one of the toy task's small models, by "
        "its preset or its folder",
        default_when={"model": whose_defaults},
    )
    tokenizer: str = option(
        "", "folder with tokenizer.json; empty: the model's, else the teacher's", fixed=True
    )
    name: str = option("", "name of the run's folder; empty: a new unique name")
    runs: str = option("runs", "folder that holds all runs")
    resume: bool | Literal["auto"] = option(
        False,
        "continue the run --name from its newest checkpoint; auto: begin it if there is none",
        also=("auto",),
    )
    dry_run: bool = option(
        False, "say what the run would do, with its first prompt as the model sees it, and stop"
    )
    plugin: str = option(
        "",
        "Python files with commas between them, run first: what they add to the tables of losses, "
        "advantages, rewards and tasks can be chosen (docs/forking.md)",
        load=plugins.load,
    )
    seed: int = option(
        0, "random seed of data, samples and weights", minimum=0, below=2**63, fixed=True
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device; auto: a GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = option(
        "auto", "dtype of activations; auto: bfloat16 on a GPU, float32 on a CPU"
    )

    drop_layers: str = option(
        "", "layers of --model to leave out, as in 3,5,8-10 (from 0): a smaller student", fixed=True
    )
    data: str = option(
        "word_problems:800",
        "training data: a task (endless, or with :800 its first 800 problems), a .jsonl, .json or "
        ".parquet file, a folder, org/name/file of a hub dataset; a.jsonl,b.json:0.3: files mixed "
        "by weight",
        default_when=in_grpo("word_problems"),
        fixed=True,
    )
    train_examples: int = option(
        0, "number of examples that are trained on; 0: all", minimum=0, fixed=True
    )
    template: Literal["auto", "chat", "plain"] = option(
        "auto", "format of examples; auto: chat if the tokenizer has a chat template", fixed=True
    )
    system_prompt: str = option("", "system prompt of conversations without one", fixed=True)
    prompt_suffix: str = option("", "text appended to every question", fixed=True)
    chat_template_kwargs: str = option(
        "", "chat template arguments, as in enable_thinking=false, or as JSON", fixed=True
    )
    max_length_policy: Literal["error", "drop"] = option(
        "error", "what happens to an example longer than --micro_batch_tokens", fixed=True
    )
    bad_rows: Literal["error", "drop"] = option(
        "error", "what happens to a row that is empty or without an answer it needs", fixed=True
    )
    show_batch: int = option(
        0, "print this many examples of the first batch, trained tokens marked, and stop", minimum=0
    )

    optimizer: Literal["adamw", "muon"] = option(
        "muon",
        "AdamW for all, or Muon for the matrices in the blocks or adapters and AdamW for the rest",
        default_when=in_grpo("adamw") | {"defaults": {"pretrained": "adamw"}},
        fixed=True,
    )
    steps: int = option(
        500,
        "optimizer steps; 0: by --epochs",
        minimum=0,
        default_when={"optimizer": {"adamw": 1000}} | in_grpo(200) | for_pretrained(0, 0),
    )
    epochs: float = option(
        1.0,
        "passes over the data; given without --steps, it is --steps 0",
        above=0,
        read_when={"steps": (0,)},
        default_when=for_pretrained(3.0, 1.0),
        implies={"steps": 0},
    )
    batch_size: int = option(
        32, "examples (samples) per global step", minimum=1, default_when=in_grpo(128), fixed=True
    )
    micro_batch_tokens: int = option(
        8192,
        "maximum tokens of a forward pass, and of an example; auto: as many as fit",
        minimum=1,
        also=("auto",),
        fixed=if_dropping,
    )
    weighting: str = option(
        "token",
        "what has equal weight in the loss: every token, or every sequence",
        choices=WEIGHTINGS,
        read_when={"mode": ("sft", "kd")},
        fixed=True,
    )
    lr: float = option(
        1e-2,
        "peak learning rate",
        above=0,
        default_when={"optimizer": {"adamw": 5e-3}} | in_grpo(3e-4) | for_pretrained(2e-5, 1e-6),
    )
    warmup: int = option(20, "steps of linear learning-rate warm-up", minimum=0)
    schedule: Literal["constant", "linear", "cosine"] = option(
        "cosine", "learning-rate schedule after the warm-up", default_when=in_grpo("linear")
    )
    lr_floor: float = option(
        0.1,
        "learning rate at the last step, as a fraction of --lr",
        minimum=0,
        maximum=1,
        read_when={"schedule": ("linear", "cosine")},
    )
    beta1: float = option(0.9, "AdamW's decay of the first moment", minimum=0, below=1)
    beta2: float = option(0.98, "AdamW's decay of the second moment", minimum=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", above=0)
    weight_decay: float = option(
        0.3,
        "decoupled weight decay, of matrices only",
        minimum=0,
        default_when=in_grpo(0.0) | for_pretrained(0.0, 0.0),
    )
    max_grad_norm: float = option(
        1.0, "global gradient norm above which gradients are clipped; 0: never", minimum=0
    )
    max_skipped: int = option(
        5, "stop after so many steps in a row without finite gradients", minimum=1
    )

    lora_rank: int = option(
        0, "rank of LoRA adapters; 0: train the model itself", minimum=0, fixed=True
    )
    lora_alpha: float = option(
        32.0, "alpha of LoRA: adapters are scaled by alpha / rank", above=0, fixed=True
    )
    lora_rslora: bool = option(False, "scale adapters by alpha / sqrt(rank): rsLoRA", fixed=True)
    lora_targets: str = option(
        "all", "adapted linear layers, as in q_proj,v_proj; all: all seven", fixed=True
    )
    lora_dropout: float = option(
        0.0, "dropout of adapter inputs; off where rollout log-probs are used", minimum=0, below=1
    )

    teacher: str = option(
        "",
        "teacher: a folder, hub id or preset; self: the policy as it began; self_average: its "
        "moving average; math=A,code=B: several, of which the column `teacher` names one; empty: "
        "the toy task's, trained on first use",
        read_when=WITH_TEACHER,
        fixed=if_rollout_is_reused,
    )
    teacher_prompt: str = option(
        "",
        "what the teacher is asked, with {question} and {answer}; empty, and no such column: the "
        "same as the student",
        read_when=WITH_TEACHER,
        fixed=True,
    )
    kd_average: float = option(
        0.99,
        "decay of the moving average, per step",
        above=0,
        below=1,
        read_when={"teacher": (AVERAGE,)},
        fixed=True,
    )
    kd_divergence: str = option(
        "forward_kl",
        "divergence of student and teacher",
        choices=DIVERGENCES,
        read_when=WITH_TEACHER,
        default_when=in_grpo("reverse_kl"),
    )
    kd_beta: float = option(
        0.5,
        "weight of the forward KL (mixed_kl), or in a mixture that of the teacher (jsd, "
        "skew_forward_kl) or of the student (skew_reverse_kl)",
        minimum=0,
        maximum=1,
        read_when={"kd_divergence": WITH_BETA},
    )
    kd_temperature: float = option(
        2.0, "temperature of teacher and student in the divergence", above=0, read_when=TEACHING
    )
    kd_t_squared: bool = option(
        False, "multiply the divergence by the squared --kd_temperature", read_when=TEACHING
    )
    kd_ce: float = option(
        0.0, "weight of cross-entropy beside the divergence", minimum=0, maximum=1
    )
    kd_prefix: Literal["data", "student", "teacher"] = option(
        "data", "text that is trained on: from the data, or generated by a model", fixed=True
    )
    kd_prefix_tokens: int = option(
        0,
        "tokens of the data's answer from which samples go on, at most half of it",
        minimum=0,
        read_when={"kd_prefix": ("student",)},
        fixed=True,
    )
    kd_mix: float = option(
        1.0,
        "fraction of steps on generated text, the others on the data",
        minimum=0,
        maximum=1,
        read_when=GENERATED,
        fixed=True,
    )
    kd_signal: Literal["full", "topk", "student_topk", "draws", "sampled", "unlikely"] = option(
        "full",
        "teacher's signal: all probabilities, those of its own or of the student's top-k and a "
        "bucket for the rest, ids drawn from it, or log-probs of sampled tokens as advantages; "
        "unlikely: no teacher, a fixed advantage of -0.5 on the least likely fifth of a sample's "
        "tokens, as a control",
        fixed=True,
    )
    kd_topk: int = option(
        64, "number of teacher probabilities per token", minimum=1, read_when=TOPK
    )
    kd_draws: int = option(
        64,
        "number of ids drawn from the teacher per token",
        minimum=1,
        maximum=65535,
        read_when=DRAWS,
    )
    kd_cache: str = option(
        "",
        "folder for the teacher's top-k or draws of all data; once it is filled, no teacher is "
        "loaded",
        read_when={"kd_signal": ("topk", "draws"), "kd_prefix": ("data",)},
    )
    kd_weight_by: Literal["none", "teacher_entropy", "student_entropy"] = option(
        "none",
        "whose entropy, over its largest, is a token's weight in the divergence",
        read_when={"kd_signal": ("full", "topk", "student_topk", "draws")},
    )
    kd_clip: float = option(
        0.0, "largest divergence of a token, in nats; 0: none", minimum=0, read_when=DISTRIBUTION
    )

    sample_tokens: int = option(
        64, "maximum new tokens per sample", minimum=1, default_when=for_pretrained(512, 512)
    )
    sample_tokens_start: int = option(
        0,
        "maximum new tokens in the first rollout, from where it grows to --sample_tokens over the "
        "run; 0: does not grow",
        minimum=0,
        fixed=True,
    )
    sample_temperature: float = option(
        1.0,
        "temperature of sampling, in grpo of all log-probs",
        above=0,
        fixed=if_rollout_is_reused,
    )
    sample_top_k: int = option(
        0, "number of most probable tokens to sample from; 0: all", minimum=0
    )
    sample_top_p: float = option(
        1.0, "total mass of the most probable tokens to sample from", above=0, maximum=1
    )
    sample_batch: int = option(256, "sequences generated at once, per rank", minimum=1)
    sample_log: int = option(8, "samples of a rollout in samples.jsonl", minimum=0, read_when=GRPO)

    grpo_variant: str = option(
        "token",
        "loss, with the advantage and clip bounds of its paper; grpo: DeepSeekMath, token: DAPO",
        choices=VARIANTS,
        fixed=if_rollout_is_reused,
    )
    grpo_samples: int = option(
        8, "samples per prompt; advantages compare them", minimum=2, fixed=True
    )
    grpo_reward: str = option(
        "accuracy",
        "parts with weights, as in accuracy,format:0.5,path/to/file.py:function:0.1",
        named=PARTS,
    )
    grpo_reward_seconds: float = option(
        300.0, "longest that a function of --grpo_reward may take for a sample; 0: any", minimum=0
    )
    grpo_advantage: str = option(
        "std",
        "how the rewards of a prompt's samples become advantages; maxrl: (r - mean) / mean",
        choices=ADVANTAGES,
        default_when={"grpo_variant": {"dr_grpo": "mean", "dppo": "mean"}},
    )
    grpo_clip_low: float = option(
        0.2,
        "the policy ratio is clipped below at 1 minus this; 1: no lower bound; gmpo: below at e to "
        "minus this; dppo: where the token's probability has fallen by this",
        above=0,
        maximum=1,
        read_when=CLIPPED,
        default_when={
            "grpo_variant": {"gspo": 3e-4, "cispo": 1.0, "gmpo": 0.4, "dppo": 0.15, "mis": 1e-3}
        },
    )
    grpo_clip_high: float = option(
        0.2,
        "the policy ratio is clipped above at 1 plus this; gmpo: at e to this; dppo: where the "
        "token's probability has risen by this",
        above=0,
        read_when=CLIPPED,
        default_when={
            "grpo_variant": {"token": 0.28, "gspo": 4e-4, "gmpo": 0.4, "dppo": 0.15, "mis": 1e-3}
        },
    )
    grpo_kl_coef: float = option(
        0.0,
        "weight of the KL to the reference model; 0: none",
        minimum=0,
        fixed=if_rollout_is_reused,
    )
    reference: str = option(
        "",
        "reference model: a folder, hub id or preset; empty: the policy at its start",
        read_when=WITH_REFERENCE,
        fixed=True,
    )
    grpo_kl_in: Literal["loss", "reward"] = option(
        "loss",
        "where the reference KL goes: into the loss, or off the reward",
        fixed=if_rollout_is_reused,
    )
    grpo_kl_estimator: str = option(
        "k3",
        "estimator of the KL to the reference: k1 in the reward, else k2, k3",
        choices=KL_ESTIMATORS,
        default_when={"grpo_kl_in": {"reward": "k1"}},
    )
    grpo_entropy_coef: float = option(0.0, "weight of the entropy bonus")
    grpo_minibatches_per_rollout: int = option(
        1, "optimizer steps per pass over a rollout, each on a part of it", minimum=1, fixed=True
    )
    grpo_ppo_epochs: int = option(1, "passes over each rollout", minimum=1, fixed=True)
    grpo_paced: bool = option(
        False,
        "weigh a prompt in every term of the loss by p(1 - p), p its share of right samples",
        fixed=if_rollout_is_reused,
    )
    grpo_dynamic_sampling_rounds: int = option(
        0, "rounds that replace groups that are all right or all wrong by new ones", minimum=0
    )
    grpo_mask_truncated: bool = option(
        False, "samples that did not stop carry no loss and count in no divisor"
    )
    grpo_truncation_penalty: float = option(
        0.0, "subtracted from the reward of a sample that did not stop", minimum=0
    )
    grpo_length_penalty: int = option(
        0, "tokens before --sample_tokens over which the reward falls by up to 1", minimum=0
    )
    grpo_tis: Literal["none", "truncate", "mask", "mask_sequence"] = option(
        "none",
        "importance weights against the sampler's rounding errors; mask_sequence: the geometric "
        "mean of a sample's, as gspo, gmpo and mis always have it",
        fixed=if_rollout_is_reused,
    )
    grpo_tis_cap: float = option(
        2.0,
        "limit of --grpo_tis weights",
        minimum=1,
        read_when={"grpo_tis": ("truncate", "mask", "mask_sequence")},
    )
    grpo_kd_coef: float = option(
        0.0,
        "weight of a divergence from --teacher on the samples",
        minimum=0,
        fixed=if_rollout_is_reused,
    )

    eval_every: int = option(
        100,
        "steps between evaluations; 0: at start and end",
        minimum=0,
        default_when=in_grpo(50) | for_pretrained(250, 50),
    )
    eval_data: str = option(
        "",
        "file of the validation examples; empty: they are set apart from --data",
        read_when={"eval_examples": ABOVE_0},
        fixed=True,
    )
    eval_examples: int = option(
        400,
        "number of validation examples; of files the default is a tenth of the rows where that is "
        "less; 0: no evaluation",
        minimum=0,
        default_when=for_pretrained(200, 200),
        fixed=if_carved,
    )
    eval_tokens: int = option(
        96,
        "maximum new tokens per answer in evaluations",
        minimum=1,
        default_when=for_pretrained(512, 512),
    )
    save: Literal["every", "best", "last", "none"] = option(
        "every",
        "checkpoints that are written: every --save_every steps; those and the best of all "
        "evaluations, which stays; the last alone, as the run ends or is stopped; none",
    )
    save_every: int = option(
        250,
        "steps between checkpoints; 0: only at the end",
        minimum=0,
        read_when=SAVED,
        default_when=in_grpo(50),
    )
    max_checkpoints: int = option(
        2, "number of newest checkpoints that are kept", minimum=1, read_when=SAVED
    )
    log_every: int = option(
        50,
        "steps between progress lines, of which there is one every half minute, too",
        minimum=1,
        default_when=in_grpo(10),
    )

    activation_checkpointing: bool = option(False, "recompute activations: less memory, more time")
    shard: Literal["off", "on", "auto"] = option(
        "auto",
        "split weights, gradients and optimizer states of the model over the ranks; auto: where "
        "they take more than a third of a GPU",
    )
    shard_frozen: Literal["off", "on", "auto"] = option(
        "auto",
        "split teachers and reference over the ranks; auto: as --shard, all of them together",
    )
    shard_ranks: int = option(
        0,
        "neighbouring ranks that share a model, each group of them with a replica; 0: those of a "
        "machine",
        minimum=0,
    )
    shard_rollouts: Literal["off", "on", "auto"] = option(
        "auto",
        "generate with models in shards as they are, all ranks in lockstep, without a whole copy; "
        "auto: where that copy takes more than a third of a GPU",
    )
    memory_gb: float = option(
        0.0, "memory of a GPU that a run may plan with, in GB; 0: all that it has", minimum=0
    )
    kernels: str = option(
        "auto", "backend of fused operations; auto: Triton on a GPU, else PyTorch", choices=CHOICES
    )
    threads: int = option(
        0,
        "threads of a process on a CPU; 0: one for a small model, else PyTorch's choice",
        minimum=0,
    )
    compile: bool = option(False, "torch.compile the transformer's blocks")
    wandb: Literal["off", "offline", "online"] = option("off", "log to Weights & Biases")
    wandb_project: str = option("srlm", "project in Weights & Biases", read_when=TRACKED)
    wandb_group: str = option(
        "", "group of the run there, as of one arm's seeds", read_when=TRACKED
    )
    wandb_tags: str = option("", "tags of the run there, as in gsm8k,first", read_when=TRACKED)


def sampling_of(cfg: Config) -> dict[str, Any] | None:
    """Return how the trained model is sampled in training, in the words of `transformers`; None if
    it is not."""
    if cfg.mode != "grpo" and not (cfg.mode == "kd" and cfg.kd_prefix == "student"):
        return None
    return {
        "temperature": cfg.sample_temperature,
        "top_k": cfg.sample_top_k,
        "top_p": cfg.sample_top_p,
    }


def listed_ids(cfg: Config) -> int:
    """Return how many ids of the teacher's distribution are known, or drawn, per token."""
    return cfg.kd_draws if cfg.kd_signal == "draws" else cfg.kd_topk


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
    return cfg.mode == "kd" and cfg.kd_signal in OWN_TOKENS


def teachers_of(cfg: Config) -> dict[str, str]:
    """Return {name in the column `teacher`: model} of --teacher; the model "" is the toy task's."""
    if "=" not in cfg.teacher or Path(cfg.teacher).is_dir():
        return {cfg.teacher: cfg.teacher}
    teachers = {}
    for part in cfg.teacher.split(","):
        name, _, model = part.partition("=")
        if model in SELF:
            raise UserError(
                f"--teacher {cfg.teacher}: {model} teaches alone; name a folder for {name!r}, or "
                f"--teacher {model}"
            )
        if not name or not model or name in teachers:
            raise UserError(
                f"--teacher {cfg.teacher}: write several as math=folder,code=folder, each with a "
                "name of its own"
            )
        teachers[name] = model
    return teachers


# --- what must hold between options --------------------------------------------------------------
def validate(cfg: Config) -> None:
    """Refuse options that do not work together, before anything is read. Raises UserError."""
    parse_targets(cfg.lora_targets)
    tracking.check(cfg.wandb)
    _validate_run(cfg)
    _validate_teachers(cfg)
    if cfg.mode == "kd":
        _validate_signal(cfg)
    if cfg.mode == "grpo":
        _validate_grpo(cfg)
    has_divergence = cfg.mode == "kd" or (cfg.mode == "grpo" and cfg.grpo_kd_coef > 0)
    if has_divergence and cfg.kd_divergence.startswith("skew") and cfg.kd_beta == 1:
        raise UserError(f"--kd_beta 1 makes {cfg.kd_divergence} zero everywhere; set one below 1")


def _validate_run(cfg: Config) -> None:
    if "/" in cfg.name or cfg.name.startswith("."):
        raise UserError(f"--name {cfg.name} must be a plain folder name")
    if cfg.resume and not cfg.name:
        raise UserError("--resume needs the --name of a run")
    if not cfg.micro_batch_tokens and cfg.max_length_policy == "drop":
        raise UserError("--micro_batch_tokens auto would choose what is dropped; give a number")
    if cfg.save == "best" and not cfg.eval_examples:
        raise UserError("--save best chooses by evaluations; set --eval_examples above 0")
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine offers no CUDA device")
    if cfg.sample_tokens_start > cfg.sample_tokens:
        raise UserError("--sample_tokens_start must be at most --sample_tokens")


def _validate_teachers(cfg: Config) -> None:
    if cfg.kd_cache and cfg.teacher == AVERAGE:
        raise UserError("--kd_cache keeps what a fixed teacher says; self_average moves")
    if len(teachers_of(cfg)) > 1 and (cfg.kd_cache or cfg.kd_prefix == "teacher"):
        raise UserError("--kd_cache and --kd_prefix teacher take one --teacher; name a single one")
    if cfg.kd_cache and cfg.kd_weight_by == "teacher_entropy":
        raise UserError(
            "--kd_cache does not keep the teacher's entropy; leave it out, or set --kd_weight_by "
            "student_entropy"
        )


def _validate_signal(cfg: Config) -> None:
    if cfg.kd_signal in OWN_TOKENS:
        _validate_sampled(cfg)
    elif cfg.kd_prefix == "student" and cfg.kd_mix > 0 and cfg.kd_ce > 0:
        raise UserError(
            "--kd_ce with --kd_prefix student would teach the student to repeat its own text, "
            "right or wrong; set --kd_ce 0, or --kd_prefix data or teacher"
        )
    elif cfg.kd_signal == "draws" and cfg.kd_divergence != "forward_kl":
        raise UserError(
            "--kd_signal draws is an expectation over the teacher, which only the forward KL is; "
            "set --kd_divergence forward_kl"
        )


def _validate_sampled(cfg: Config) -> None:
    if cfg.kd_prefix != "student":
        raise UserError(
            f"--kd_signal {cfg.kd_signal} is an expectation over the student's own tokens; set "
            "--kd_prefix student"
        )
    truncated = cfg.sample_top_p < 1 or cfg.sample_top_k > 0
    if truncated or cfg.kd_mix < 1 or cfg.kd_ce > 0 or cfg.kd_t_squared:
        raise UserError(
            f"--kd_signal {cfg.kd_signal} takes no --kd_mix, --kd_ce, --kd_t_squared, "
            "--sample_top_k or --sample_top_p; leave them out"
        )
    if cfg.kd_signal == "unlikely":
        return
    if cfg.kd_divergence != "reverse_kl" or cfg.kd_temperature != cfg.sample_temperature:
        raise UserError(
            "--kd_signal sampled is the reverse KL at the sampling temperature; set "
            "--kd_divergence reverse_kl and equal temperatures"
        )


def _validate_grpo(cfg: Config) -> None:
    if cfg.sample_top_p < 1 or cfg.sample_top_k > 0:
        raise UserError(
            "--sample_top_k and --sample_top_p change who samples: grpo trains on the whole "
            "distribution; leave them out"
        )
    if cfg.batch_size % cfg.grpo_samples:
        raise UserError(
            f"--batch_size {cfg.batch_size} samples are no whole groups of --grpo_samples "
            f"{cfg.grpo_samples}; choose a multiple"
        )
    if cfg.show_batch:
        raise UserError(
            "--show_batch shows data; grpo trains on samples: see a run's samples.jsonl"
        )
    if cfg.grpo_length_penalty > cfg.sample_tokens:
        raise UserError("--grpo_length_penalty must be at most --sample_tokens")
    # losses/grpo.py says what the gradient of each estimator is
    if cfg.grpo_kl_coef > 0 and cfg.grpo_kl_in == "reward" and cfg.grpo_kl_estimator != "k1":
        raise UserError(
            f"--grpo_kl_estimator {cfg.grpo_kl_estimator} in the reward drives the policy away "
            "from its reference (arXiv 2510.01555, 2512.21852); set --grpo_kl_estimator k1, or "
            "--grpo_kl_in loss"
        )
    if cfg.grpo_kl_coef > 0 and cfg.grpo_kl_in == "loss" and cfg.grpo_kl_estimator == "k1":
        raise UserError(
            "--grpo_kl_estimator k1 in the loss has a gradient that is 0 on average (arXiv "
            "2510.01555, 2512.21852); set --grpo_kl_estimator k3 or k2, or --grpo_kl_in reward"
        )
