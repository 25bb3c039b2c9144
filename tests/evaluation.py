"""Shared by the tests of `python -m eval`: tiny checkpoints, small test sets, results read back."""

import json

import torch

import toy_models
import train
from data.tokenizer import Tokenizer
from eval import __main__ as evaluation
from model.checkpoint import build_model, save_model
from model.generate import Completion
from model.presets import PRESETS
from model.transformer import ModelConfig

CODE = ("humaneval", "mbpp")
MATH = ("gsm8k", "svamp", "math500", "amc23", "aime24", "minerva_math", "olympiadbench")
SMALL_SHAPE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    tie_word_embeddings=False,
)


def checkpoint(folder, seed=0, tokenizer=None, **shape):
    """A checkpoint with random weights."""
    folder.mkdir(parents=True)
    tokenizer = tokenizer or toy_models.toy_tokenizer()
    fields = vars(PRESETS["tiny"]) | SMALL_SHAPE | {"vocab_size": tokenizer.size} | shape
    model = build_model(ModelConfig(**fields), None, device="cpu", seed=seed)
    with torch.no_grad():
        model.head_VD.mul_(4)  # far from uniform: its most likely ids are not nearly tied
    save_model(model, folder, tokenizer, tokenizer.stop_ids())
    return folder


def trained(home, name, data, *args):
    """The folder of a run of one step."""
    argv = f"--mode=sft --model=tiny --device=cpu --steps=1 --batch_size=1 --runs={home}".split()
    argv += [f"--data={data}", f"--name={name}", "--eval_tokens=2"]
    assert train.main([*argv, *(args or ["--eval_examples=0"])]) == 0
    return home / name


def command(capsys):
    """A function that runs the command: (exit code, what it printed, errors)."""

    def run(*argv):
        return (evaluation.main([str(a) for a in argv]), *capsys.readouterr())

    return run


def speaker(answer):
    """Takes the place of `generate`: every model says answer(number of the prompt)."""
    tokenizer = toy_models.toy_tokenizer()

    def generate(model, prompts, *_, on_done, **more):
        for i in range(len(prompts)):
            on_done(i, Completion(tokenizer.encode(answer(i)), [0.0], True))

    return generate


def rows(folder, task):
    (path,) = folder.glob(f"*/{task}.jsonl")
    return read_lines(path)


def read_lines(path):
    """The rows, without their checksums, which differ where a rounded number does."""
    rows = [json.loads(line) for line in path.read_text().split("\n") if line]
    return [{name: value for name, value in row.items() if name != "crc32"} for row in rows]


def stated(out, task):
    """What the results say of a task's prompts."""
    (path,) = out.glob(f"*/{task}.json")
    return json.loads(path.read_text())["identity"]["prompt"]


def summary_of(out):
    return json.loads((out / "summary.json").read_text())


def arguments_tokenizer():
    """The toy tokenizer with a template that shows its arguments: [thinks] and [x=3]."""
    return with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is not defined or enable_thinking %}[thinks]{% endif %}"
        "{% if x is defined %}[x={{ x }}]{% endif %}{% endif %}"
    )


def with_template(template):
    """The toy tokenizer with another chat template."""
    files = dict(toy_models.toy_tokenizer().files)
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": template}
    files["tokenizer_config.json"] = json.dumps(config).encode()
    return Tokenizer(files, "a tokenizer with a template of its own")


def math_rows(i):
    """A row of every mathematical set, in the set's own form, with the gold answer i."""
    problem, solution = f"Find ${i}$.", f"$\\boxed{{{i}}}$"
    return {
        "gsm8k": {"question": f"How much is {i}?", "answer": f"It is <<{i}={i}>>{i}.\n#### {i}"},
        "svamp": svamp_row(float(i), f"There are {i} figs"),
        "math500": {"problem": problem, "solution": solution, "answer": f"{i}"},
        "amc23": {"problem": problem, "answer": float(i)},
        "aime24": {"problem": problem, "solution": "", "answer": f"00{i}"},
        "minerva_math": {"problem": problem, "solution": f"So \\boxed{{{i}e3}} m."},
        "olympiadbench": {
            "question": problem,
            "solution": [f"It is {i}."],
            "final_answer": [f"${i}$"],
        },
    }


def svamp_row(answer, body="There are figs"):
    return {"Body": body, "Question": "How many?", "Equation": "( 1.0 )", "Answer": answer}


def code_rows(i):
    """A row of every set of programs; the gold programs add i."""
    return {
        "humaneval": {
            "prompt": f"def f{i}(x):\n",
            "canonical_solution": f"    return x + {i}\n",
            "entry_point": f"f{i}",
            "test": f"def check(f):\n    assert f(1) == {i + 1}",
        },
        "mbpp": {
            "task_id": i + 4,
            "text": f"Add {i}.",
            "code": f"def f(x): return x + {i}",
            "test_list": [f"assert f(1) == {i + 1}"],
        },
    }


def small_sets(folder):
    """Test sets of three rows each, in the sets' own forms, with gold answers 7, 8 and 9."""
    for i in (7, 8, 9):
        for name, row in (math_rows(i) | code_rows(i)).items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            with open(folder / name / "test.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
    return folder
