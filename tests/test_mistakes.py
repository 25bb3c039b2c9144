"""What people do wrong, and the one line that each gets: a table, from command lines to words.

All are refused with exit code 2, before a weight is loaded, and leave nothing behind.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

import toy_models
import train
from data import download
from eval import __main__ as evaluation
from eval import chat, compare, traces
from eval.study import __main__ as study
from model import export
from model.checkpoint import build_model, save_model
from model.presets import PRESETS
from tests.test_plugins import tables  # noqa: F401

ROWS = [{"question": f"How much is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(12)]
FAILS = """
from kernels.divergences import DIVERGENCES
from rl.advantage import ADVANTAGES

def moon(example, completion):
    return example.columns["moon"]

def needs(example, completion, moon):
    return 1.0

def late(student_logp, teacher_logp, beta):
    return student_logp.no_such_method()

def whole(student_logp, teacher_logp, beta):
    return (teacher_logp - student_logp).sum()

def nan(student_logp, teacher_logp, beta):
    return (teacher_logp - student_logp).sum(-1) * float("nan")

DIVERGENCES["late"], DIVERGENCES["whole"], DIVERGENCES["nan"] = late, whole, nan
ADVANTAGES["one"] = lambda rewards_G: 1 / 0
"""
TALK = [{"prompt": f"Say {n}."} for n in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as a user has it: data, a model, a finished run and one without a checkpoint."""
    home = tmp_path_factory.mktemp("home")
    (home / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    bare = [row | {"answer": str(n + 1)} for n, row in enumerate(ROWS)]
    (home / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    (home / "talk.jsonl").write_text("\n".join(map(json.dumps, TALK)))
    (home / "mine.csv").write_text("question,answer\n1,2\n")
    (home / "empty.jsonl").write_text("")
    (home / "r.py").write_text("def good(example, completion):\n    return 1.0\n")
    (home / "bad.py").write_text("import sys\nsys.exit(0)\n")
    (home / "fails.py").write_text(FAILS)
    label = [{"question": row["question"], "label": "7"} for row in ROWS]
    (home / "label.jsonl").write_text("\n".join(map(json.dumps, label)))
    (home / "odd.jsonl").write_text('{"text_in": "What?", "text_out": "7"}\n')
    (home / "study.toml").write_text("[study]\nseeds = [0]\n")
    (home / "c.yaml").write_text("lr: 1\n")
    (home / "trl.toml").write_text("learning_rate = 1e-5\n")
    (home / "old.toml").write_text('mode = "sft"\nkd_beta = 0.5\n')
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    (home / "model").mkdir()
    save_model(model, home / "model", toy_models.toy_tokenizer(), [0])
    run = home / "runs/done"
    shutil.copytree(home / "model", run / "checkpoints/step-5")
    stored = train.settings_of(train.Config(mode="sft"))
    (run / "config.json").write_text(json.dumps(stored))
    (run / "metrics.jsonl").write_text('{"step": 5}\n')
    (home / "runs/empty/checkpoints").mkdir(parents=True)
    return home


TOPK = "--mode=kd --teacher=model --kd_signal=topk"
MISTAKES = [
    # names that other programs have
    (
        "--learning_rate=1e-4",
        "--learning_rate is not an option, but of other programs; here it is --lr",
    ),
    ("--per_device_train_batch_size 4", "here it is --batch_size, of a whole step"),
    ("--gradient_accumulation_steps=8", "micro-batches are cut by --micro_batch_tokens"),
    ("--num_train_epochs=3", "here it is --epochs"),
    ("--temperature 0.7", "--sample_temperature, or --kd_temperature"),
    ("--beta=0.04", "--grpo_kl_coef, the weight of the KL to the reference, or --kd_beta"),
    ("--model_name_or_path=x", "here it is --model"),
    ("--max-new-tokens=9", "here it is --sample_tokens"),
    ("--output_dir=o", "--runs, the folder of all runs, and --name"),
    ("--max_steps=9", "here it is --steps"),
    ("--num_generations=8", "here it is --grpo_samples"),
    ("--max_completion_length=9", "here it is --sample_tokens"),
    ("--warmup_ratio=0.1", "here it is --warmup, in steps"),
    ("--lr_scheduler_type=cosine", "here it is --schedule"),
    ("--bf16", "here it is --dtype bfloat16"),
    ("--report_to=wandb", "here it is --wandb"),
    ("--seed_data=1", "here it is --seed"),
    ("--device_batch_size=1", "here it is --batch_size"),
    ("--config=trl.toml", "trl.toml: learning_rate is not an option, but of other programs"),
    # slips of the fingers
    ("-lr 1e-4", "-lr 1e-4: an option begins with two dashes, as in --lr"),
    ("lrr=1e-4", "lrr=1e-4"),
    ("data.train_files=x", "data.train_files=x is not an option, but of other programs; here it"),
    ("actor_rollout_ref.rollout.n=8", "here it is --grpo_samples"),
    ("--actor_rollout_ref.actor.optim.lr=1", "did you mean lr?"),
    ("mine.jsonl", "mine.jsonl is not an option; see --help"),
    ("--lr=1e-5e", "--lr: '1e-5e' is not a number"),
    ("--lr=0", "--lr must be above 0"),
    ("--lr=nan", "--lr: nan is not a number that is finite"),
    ("--mode=dpo", "sft, kd, grpo"),
    ("--mode=KD", "kd"),
    ("--device=gpu", "cuda"),
    ("--dtype=fp16", "float32, bfloat16"),
    ("--wandb=true", "off, offline, online"),
    ("--save=newest", "every, best, last, none"),
    ("--resume=maybe", "--resume: 'maybe' is not true or false or auto"),
    ("--seed=-1", "--seed must be at least 0"),
    ("--system_prompt", "--system_prompt: expected one argument"),
    ("--kd_divergence=fkl", "forward_kl"),
    ("--lora_rank=2 --lora_targets=query", "no layer 'query'"),
    ("--drop_layers=99", "--drop_layers 99: tiny has the layers 0 to 1"),
    # models
    ("--mode=sft --model=Qwen2.5-0.5B", "--model Qwen2.5-0.5B: no such folder"),
    ("--mode=sft --model=runs/empty", "--model runs/empty: this run has no checkpoint yet"),
    ("--mode=sft --model=runs/nope", "--model runs/nope: no such folder"),
    ("--teacher=qwen2.5-7b", "--teacher qwen2.5-7b is a preset, a shape with random weights"),
    ("--mode=grpo --grpo_kl_coef=0.1 --reference=tiny", "or write random:tiny if that is what"),
    ("--model=model --data=mine.jsonl --teacher=", "--teacher is needed"),
    ("--mode=sft --teacher=model", "teacher is not read with mode=sft"),
    ("--mode=sft --tokenizer=nowhere", "nowhere"),
    ("--mode=sft --model=model/model.safetensors", "is a file; name the folder that it is in"),
    ("--mode=grpo --grpo_reward=r.py", "r.py: which function? write r.py:NAME"),
    # data
    ("--mode=sft --data=mine.csv", "mine.csv: a data file ends in .jsonl, .json"),
    ("--mode=sft --data=mine.json", "--data mine.json: no such file"),
    ("--mode=sft --data=.", "which file of the folder?"),
    ("--mode=sft --data=empty.jsonl", "empty.jsonl is empty"),
    (
        "--mode=sft --data=mine.jsonl --eval_examples=99",
        "has 12 different questions; --eval_examples 99",
    ),
    ("--mode=sft --data=mine.jsonl --eval_examples=2 --micro_batch_tokens=9", "raise it or set"),
    ("--mode=grpo --data=talk.jsonl --eval_examples=2", "no answer that a grader knows"),
    # what does not go together
    ("--epochs=3 --steps=9", "epochs is not read with steps=9, only with --steps 0"),
    ("--save=best --eval_examples=0", "--save best chooses by evaluations"),
    ("--save=none --save_every=5", "save_every is not read with save=none"),
    ("--mode=grpo --batch_size=10", "no whole groups of --grpo_samples 8"),
    ("--mode=grpo --sample_top_p=0.9", "change who samples"),
    ("--mode=grpo --grpo_reward=r.py", "r.py"),
    ("--mode=grpo --grpo_reward=r.py:god", "has no function 'god'"),
    ("--mode=grpo --grpo_reward=bad.py:f", "--grpo_reward bad.py:2: SystemExit: 0"),
    ("--kd_prefix=student --kd_ce=0.5", "set --kd_ce 0, or --kd_prefix data or teacher"),
    ("--config=c.yaml", "YAML is not read; write TOML"),
    ("--config=old.toml", "kd_beta is not read with mode=sft"),
    ("--config=nowhere.toml", "nowhere.toml is not there"),
    ("--mode=sft --shard=on", "--shard on: this is one process; start several with torchrun"),
    ("--mode=kd --teacher=model --shard_frozen=on", "--shard_frozen on: this is one process"),
    # what a user of the README alone got wrong, thought up before the code was looked at
    ("--modle=runs/done", "--modle is not an option; did you mean model?"),
    ("--taecher=model", "did you mean teacher?"),
    ("--dta=mine.jsonl", "did you mean data?"),
    ("--epoch=2", "did you mean epochs?"),
    ("--epochs=two", "--epochs: 'two' is not a number"),
    ("--epochs=-1", "--epochs must be above 0"),
    ("--lr=1e-5,2e-5", "--lr: '1e-5,2e-5' is not a number"),
    ("--batch_size=0", "--batch_size must be at least 1"),
    ("--threads=many", "--threads: 'many' is not a whole number"),
    ("--wandb=online --wandb_tags", "--wandb_tags: expected one argument"),
    ("--mode=sft --teacher=model --data=mine.jsonl", "only with --mode kd, and there with"),
    (
        "--mode=sft --grpo_samples=4",
        "grpo_samples is not read with mode=sft, only with --mode grpo",
    ),
    ("--mode=sft --wandb_group=a", "only with --wandb offline or online"),
    ("--mode=sft --lora_targets=q_proj", "only with --lora_rank above 0"),
    ("--kd_divergence=reverse-kl", "did you mean reverse_kl?"),
    ("--kd_temperature=0", "--kd_temperature must be above 0"),
    ("--kd_mix=0.5", "only with --kd_prefix student or teacher"),
    ("--kd_divergence=mine", "--kd_divergence: no 'mine'; "),
    ("--mode=sft --model=done", "--model done: no such folder; did you mean runs/done?"),
    ("--mode=sft --model=runs", "--model runs: the folder has no config.json"),
    ("--mode=sft --tokenizer=mine.jsonl", "mine.jsonl has no tokenizer.json; name a folder"),
    ("--mode=sft --drop_layers=0,1", "--drop_layers leaves no layer"),
    ("--mode=sft --chat_template_kwargs=enable_thinking", "write name=value,name=value"),
    (
        "--mode=sft --data=label.jsonl --eval_examples=2",
        "its columns are question, label: an answer",
    ),
    ("--mode=grpo --data=label.jsonl --eval_examples=2", "is called answer, solution or comp"),
    ("--mode=sft --data=odd.jsonl", "columns ['text_in', 'text_out'] fit no known form"),
    ("--mode=sft --data=runs/done/metrics.jsonl", "columns ['step'] fit no known form"),
    ("--mode=sft --data=mine.jsonl,mine.jsonl", "a file is named twice"),
    ("--mode=sft --data=mine.jsonl --eval_data=nope.jsonl", "--eval_data nope.jsonl: no such file"),
    (
        "--mode=sft --data=mine.jsonl --eval_data=mine.jsonl",
        "has 12 examples; --eval_data mine.jsonl asks the same: none to train on",
    ),
    ("--mode=grpo --grpo_reward=breif.py:brief", "--grpo_reward breif.py is not there"),
    ("--mode=grpo --grpo_reward=acuracy", "no 'acuracy'; choose from accuracy"),
    ("--mode=grpo --grpo_reward=accuracy,r.py:good:lots", "'lots' is not a number"),
    ("--mode=grpo --grpo_reward=fails.py:needs", "missing a required argument: 'moon'"),
    ("--mode=grpo --grpo_samples=1", "--grpo_samples must be at least 2"),
    ("--config=study.toml", "study.toml is a study: python -m eval.study study.toml"),
    ("--plugin=nope.py", "--plugin nope.py is not there"),
    ("--name=done --resume --mode=kd", "the run was begun with 'sft' and keeps it"),
    ("--name=done --resume --steps=2", "is at step 5 already, and was told to end at step 2"),
    # what fails in code of one's own
    ("--mode=grpo --grpo_reward=fails.py:moon", "raised KeyError: 'moon' on the sample"),
    ("--plugin=fails.py --kd_divergence=late", "has no attribute 'no_such_method'"),
    ("--plugin=fails.py --kd_divergence=whole", "of two rows it returns [], not [2]"),
    ("--plugin=fails.py --mode=grpo --grpo_advantage=one", "ZeroDivisionError"),
    # runs
    ("--mode=sft --name=a/b", "--name a/b must be a plain folder name"),
    ("--mode=sft --resume", "--resume needs the --name of a run"),
    ("--resume=auto", "--resume needs the --name of a run"),
    ("--name=nope --resume", "there is no run runs/nope"),
    ("--name=empty --resume", "runs/empty has no config.json to go on with"),
    ("--mode=sft --name=done", "run runs/done exists; continue it with --resume"),
    ("--mode=sft --name=done --dry_run", "run runs/done exists; --resume would continue it"),
    ("--name=done --resume --batch_size=64", "the run was begun with 32 and keeps it"),
    # thought up later, without a look at those above
    ("--mode=sft --data=mine.jsonl,", "files are mixed, and '' is none"),
    ("--mode=kd --teacher=a=model,b", "write several as math=folder,code=folder"),
    ("--mode=KD", "no 'KD'; choose from sft, kd, grpo"),
    ("--mode=sft --dtype=bf16", "no 'bf16'; did you mean bfloat16?"),
    ("--mode=sft --threads=0.5", "--threads: '0.5' is not a whole number"),
    ("--mode=sft --save_every=-5", "--save_every must be at least 0, not -5"),
    ("--mode=sft --runs=mine.jsonl", "--runs mine.jsonl cannot be made"),
    ("--mode=sft --runs=mine.jsonl --dry_run", "--runs mine.jsonl cannot be made"),
    (f"{TOPK} --kd_topk=8 --kd_cache=mine.jsonl/a", "--kd_cache mine.jsonl/a cannot be made"),
    (f"{TOPK} --kd_topk=8 --kd_cache=mine.jsonl --dry_run", "--kd_cache mine.jsonl cannot be made"),
    (f"{TOPK} --kd_topk=513", "--kd_topk 513 is more than the 395 ids that the models share"),
    ("--mode=kd --teacher=runs/done/checkpoints", "no config.json; name a checkpoint or a run"),
    ("--mode=grpo --batch_size=10 --grpo_samples=4", "are no whole groups of --grpo_samples 4"),
    # and once more
    ("--name --dry_run", "--name: expected one argument"),
    ("--mode=sft --system-prompt --data=mine.jsonl", "--system_prompt: expected one argument"),
    ("--mode=sft --data=https://x.org/a.jsonl", "is an address; download the file and name that"),
    ("--mode=sft --data=gsm8k", "; python -m data.download gsm8k fetches it as files"),
    ("--mode=sft --data=openai/gsm8k", "; python -m data.download gsm8k fetches it as files"),
    ("--mode=sft --data=odd.jsonl", "MBPP); rename them"),
    ("--mode=sft --runs=runs/done", "--runs runs/done is a run; name the folder that it is in"),
    ("--mode=sft --model=runs/done/checkpoints/step-6", "there are runs/done/checkpoints/step-5"),
    ("--plugin=fails.py --kd_divergence=nan", "of two rows it returns what is not finite"),
]


@pytest.mark.parametrize("line,words", MISTAKES, ids=[line for line, _ in MISTAKES])
@pytest.mark.usefixtures("tables")
def test_a_mistake_is_one_line(line, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    monkeypatch.setattr("prepare.toy_model", lambda *_: pytest.fail("a model was trained"))
    monkeypatch.setattr("model.load.build_model", lambda *_, **__: pytest.fail("weights were read"))
    assert train.main(["--device=cpu", *line.split()]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("train.py: ") and error.count("\n") == 1 and words in error
    assert sorted(p for p in place.rglob("*") if p.name != ".lock") == before


ELSEWHERE = [
    (chat, "runs/empty", "checkpoint runs/empty: this run has no checkpoint yet"),
    (chat, "nope", "checkpoint nope: no such folder"),
    (evaluation, "runs/empty --tasks=word_problems", "this run has no checkpoint yet"),
    (evaluation, "runs/done --tasks=gsm9k", "no 'gsm9k'; did you mean gsm8k?"),
    (evaluation, "runs/done --task=gsm8k", "--task is not an option; did you mean tasks?"),
    (
        evaluation,
        "runs/done --tasks=word_problems --temperature=0",
        "--greedy takes the most likely",
    ),
    (evaluation, "qwen2.5-0.5b --tasks=word_problems", "a preset has random weights"),
    (traces, "runs/done --data=mine.jsonl", "the following arguments are required: --out"),
    (study, "nope.toml", "eval.study: nope.toml is not there"),
    (study, "study.toml --seeds=abc", "--seeds: 'abc' is not a whole number"),
    (study, "study.toml --seed=0", "did you mean seeds?"),
    (evaluation, "runs/done --tasks=word_problems:4", "write word_problems and --limit 4"),
    (evaluation, "runs/done --tasks=mine.csv", "no 'mine.csv'; a file ends in .jsonl"),
    (evaluation, "runs/done --tasks=mine.jsonl --n=4 --k=8", "--k 8 needs as many samples"),
    (evaluation, "runs/done", "the following arguments are required: --tasks"),
    (evaluation, "model/config.json --tasks=mine.jsonl", "is a file; name the folder"),
    (chat, "done", "checkpoint done: no such folder; did you mean runs/done?"),
    (chat, "runs/done --temprature=0", "did you mean temperature?"),
    (compare, "runs/done", "name two runs or more, as in runs/a runs/b"),
    (compare, "runs/done runs/done", "a run is named twice"),
    (compare, "runs/nope runs/done", "runs/nope is no run: it has no config.json"),
    (compare, "runs/done/checkpoints runs/done", "checkpoints is no run: it has no config.json"),
    (export, "runs/done", "the following arguments are required: OUT"),
    (download, "gsm9k", "gsm9k is not among the sets that can be fetched: gsm8k"),
    (study, "mine.jsonl", "mine.jsonl: not valid TOML"),
    (study, "runs/done/config.json", "runs/done/config.json: not valid TOML"),
    (export, "runs/done runs/done", "runs/done exists; name another folder"),
    (traces, "runs/done --data=mine.jsonl --out=t --keep=wrong", "choose from right, ended, all"),
    (evaluation, "runs/done --tasks=mine.json", "mine.json is not there"),
    (evaluation, "model --tasks=mine.jsonl --out=mine.jsonl", "--out: mine.jsonl/model-"),
    (compare, "runs/done runs/don", "runs/don is no run"),
    (evaluation, "runs/done,model --tasks=mine.jsonl", "hub id, several with spaces between"),
    (evaluation, "runs/done --tasks=mine.jsonl:4", "write mine.jsonl and --limit 4"),
    (
        evaluation,
        "model --tasks=mine.jsonl --compare --limit=2",
        "--compare: expected one argument",
    ),
    (compare, "runs/done runs/empty --evals=evils", "--evals evils is no folder; name an --out"),
    (download, "gsm8k --to=mine.jsonl", "--to mine.jsonl cannot be made (Not a directory)"),
]


@pytest.mark.parametrize("command,line,words", ELSEWHERE, ids=[line for _, line, _ in ELSEWHERE])
def test_a_mistake_elsewhere_is_one_line(command, line, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert command.main(line.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert sorted(p for p in place.rglob("*") if p.name != ".lock") == before


DRY = [
    ("--mode=sft --data=bare.jsonl --eval_examples=6", "ANSWERS ARE NOT MARKED"),
    ("--mode=sft --steps=0 --epochs=2", "as --epochs 2 takes: 2 epochs"),
    ("--mode=sft --steps=9 --warmup=9", "THE WARM-UP (9) IS NOT OVER BEFORE THE RUN IS"),
    ("--mode=sft --data=mine.jsonl --eval_examples=6", "VALIDATION TAKES 6 OF 12 EXAMPLES"),
    ("--mode=sft --data=mine.jsonl --eval_examples=2", "mine.jsonl: 10 examples trained on"),
    ("--mode=sft --data=mine.jsonl --eval_examples=2", "sft on 1 x cpu, mine: 500 steps"),
    ("--mode=sft --model=qwen2.5-0.5b --data=mine.jsonl --eval_examples=2", "RANDOM WEIGHTS"),
    ("--mode=sft --model=model --data=mine.jsonl --eval_examples=2", "weights of model"),
    ("--mode=sft --model=runs/done --data=mine.jsonl --eval_examples=2", "checkpoints/step-5"),
    ("--mode=kd --teacher=model", "teacher    model: 252,768 parameters, weights of model"),
    ("--mode=grpo --data=mine.jsonl --eval_examples=2", "gold answer: "),
    ("--mode=kd --kd_prefix=student", "the student's own answers are trained on"),
]


@pytest.mark.parametrize("line,words", DRY, ids=[f"{line} {words[:9]}" for line, words in DRY])
def test_a_dry_run_says_what_would_be_and_leaves_nothing(line, words, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    monkeypatch.setattr("prepare.toy_model", lambda *_: pytest.fail("a model was trained"))
    monkeypatch.setattr("model.load.build_model", lambda *_, **__: pytest.fail("weights were read"))
    before = sorted(place.rglob("*"))
    tokenizer = ["--tokenizer=model"] if "qwen" in line else []
    assert train.main(["--device=cpu", "--dry_run", *line.split(), *tokenizer]) == 0
    out = capsys.readouterr().out
    assert words in out and "--- example 1" in out and sorted(place.rglob("*")) == before
    for name in ("policy ", "data ", "steps ", "optimizer ", "memory ", "disk ", "writes "):
        assert f"\n{name}" in out


IN_PLACE = {
    "a pipe": os.mkfifo,
    "a file": Path.touch,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
READERS = [
    (train, "--name=done --resume"),
    (train, "--name=done --resume --dry_run"),
    (train, "--mode=sft --model=runs/done"),
    (evaluation, "runs/done --tasks=mine.jsonl"),
    (export, "runs/done out"),
]


@pytest.mark.parametrize("what", IN_PLACE)
@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step-5"])
@pytest.mark.parametrize("command,line", READERS, ids=[line for _, line in READERS])
def test_what_is_no_folder_in_the_place_of_checkpoints(
    command, line, name, what, place, tmp_path, monkeypatch, capsys
):
    """A link to nowhere was waited for, and a run without `checkpoints` began again."""
    shutil.copytree(place / "runs/done", tmp_path / "runs/done")
    shutil.copy(place / "mine.jsonl", tmp_path)
    monkeypatch.chdir(tmp_path)
    path = Path("runs/done", name)
    shutil.rmtree(path)
    IN_PLACE[what](path)
    assert command.main(line.split()) == 2
    words = f"{path} is neither a folder nor a link to one; move it away\n"
    assert capsys.readouterr().err.endswith(words)
    assert Path("runs/done/metrics.jsonl").read_text() == '{"step": 5}\n'


@pytest.mark.parametrize("command,line", [READERS[0], (compare, "runs/done runs/empty")])
def test_what_is_no_file_in_the_place_of_a_configuration_is_named(
    command, line, place, tmp_path, monkeypatch, capsys
):
    shutil.copytree(place / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    path = Path("runs/done/config.json")
    path.unlink()
    os.mkfifo(path)
    for words in ("is a pipe, a device or a socket, not a file", "is a link to nowhere, which"):
        assert command.main(line.split()) == 2
        assert f"{path} {words}" in capsys.readouterr().err
        path.unlink()
        path.symlink_to("nowhere")


@pytest.mark.parametrize("what,words", [("a pipe", "is a pipe"), ("a link to itself", "is a link")])
def test_what_is_no_file_in_the_place_of_a_lock(what, words, place, tmp_path, monkeypatch, capsys):
    shutil.copytree(place / "runs/done", tmp_path / "runs/done")
    monkeypatch.chdir(tmp_path)
    IN_PLACE[what](Path("runs/done/.lock"))
    assert train.main(["--name=done", "--resume", "--device=cpu"]) == 2
    error = capsys.readouterr().err
    assert "runs/done/.lock" in error and words in error and error.count("\n") == 1
