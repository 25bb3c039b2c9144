"""What a checkpoint knows of its training.

It travels with renames and copies, counts what a chain of runs saw, and never takes unknown for
none.
"""

import json
import os
import shutil
from random import Random

import numpy as np
import pytest

import toy_models
import train
from data import record
from data.tasks import Example
from digests import SUMS
from eval import __main__ as evaluation
from eval import traces
from model import lineage
from model.lineage import Lineage, fingerprints
from run import RunFolder
from tests.test_eval import checkpoint

pytestmark = pytest.mark.usefixtures("undrawn")
QUESTIONS = [
    f"Tom has {i} figs and buys {i + 1} more.\nHow many figs  has he now?" for i in range(6)
]
SFT = [
    "--mode=sft",
    "--model=tiny",
    "--device=cpu",
    "--steps=1",
    "--batch_size=1",
    "--eval_examples=0",
]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    """An empty working directory with a test set of six questions.

    And training files with three, one and none of them.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SRLM_DATA", raising=False)

    def row(question):
        return {"question": question, "answer": "So it is.\n#### 3"}

    jsonl(tmp_path / "sets" / "gsm8k" / "test.jsonl", map(row, QUESTIONS))
    jsonl(tmp_path / "three.jsonl", map(row, [*QUESTIONS[:3], "What is 1 + 1?"]))
    jsonl(
        tmp_path / "one.jsonl",
        map(row, [QUESTIONS[3].upper().replace(" ", "  "), "What is 2 + 1?"]),
    )
    jsonl(tmp_path / "clean.jsonl", map(row, ["What is 1 + 1?", "What is 2 + 1?"]))
    return tmp_path


def ran(name, *args):
    """A run's newest checkpoint."""
    assert train.main([*SFT, f"--name={name}", "--runs=runs", *args]) == 0
    folder = RunFolder(f"runs/{name}")
    return folder.step_folder(folder.steps()[-1])


def evaluated(capsys, place, *args, out="out"):
    """(trained_on, what is said of it) of an evaluation; (its error, "") where it is refused."""
    shutil.rmtree(out, ignore_errors=True)
    argv = [
        str(place),
        "--tasks=gsm8k",
        "--data",
        os.path.abspath("sets"),
        "--greedy",
        "--limit=1",
        "--max_tokens=2",
        f"--out={out}",
        *args,
    ]
    capsys.readouterr()
    code = evaluation.main(argv)
    error = capsys.readouterr().err
    assert code in (0, 2), error
    if code:
        assert error.count("\n") == 1
        return error, ""
    summary = json.load(open(f"{out}/summary.json"))
    ((label, task, count, unknown),) = summary["trained_on"]
    about = json.load(open(f"{out}/{label}/gsm8k.json"))["about"]
    assert task == "gsm8k" and about["trained_on"] == count and about["unknown_training"] == unknown
    said = " ".join(line for line in summary["conditions"] if "trained on" in line.lower())
    assert said in open(f"{out}/summary.md").read()
    return count, said


# --- hashes --------------------------------------------------------------------------------------

LONG = "Ann has 3 figs. She eats 1 of them!\nHow many are left?"  # 13 tokens
SHORT = "Simplify $\\sqrt{50} - \\sqrt{8}$."
CODE = "What does <b>\ndo in HTML"
WRAPPINGS = {
    "alone": "@",
    "R1-Zero's": "A conversation between User and Assistant. The Assistant thinks first and "
    "answers then, i.e., <think> thoughts </think> <answer> answer </answer>. User: @ Assistant:",
    "four sentences": "You are good at maths. Think before you answer. Be brief. Write in "
    "English. @",
    "five behind": "@ Think first. Then write. Check what you wrote. Be brief. Write in English.",
    "worked examples": "Question: What is 1 + 1?\nAnswer: 2\n\n@uestion: And 2 + 1?\n"
    "Answer: 3\n\n@uestion: @\nAnswer:",
    "bold label": "**Question:** @\n\n**Answer:**",
    "bold": "**@**",
    "labels on a line": "Q: @ A:",
    "quoted": 'Solve: "@"',
    "curly quotes": "Solve: \u201c@\u201d",
    "single quotes": "Solve '@' now",
    "suffix": "@\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "suffix without a space": "@Please reason step by step, and put your final answer within "
    "\\boxed{}.",
    "DAPO's": "Solve the following math problem step by step. The last line of your response "
    "should be of the form Answer: $Answer (without quotes) where $Answer is the answer to the "
    "problem.\n\n@\n\n"
    'Remember to put your answer on its own line after "Answer:".',
    "Alpaca's": "Below is an instruction.\n\n### Instruction:\n@\n\n### Response:",
    "ChatML": "<|im_start|>user\n@<|im_end|>\n<|im_start|>assistant\n",
    "DeepSeek's": "<\uff5cUser\uff5c>@<\uff5cAssistant\uff5c><think>\n",
    "Llama's": "<s>[INST] @ [/INST]",
    "tags": "<question>@</question>",
    "a list": "1. @\n2. What else?",
}


@pytest.mark.parametrize("question", [LONG, SHORT, CODE])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_a_question_is_found_whatever_stands_around_it(name, question):
    record = Lineage(fingerprints(["Something else?", WRAPPINGS[name].replace("@", question)]))
    assert record.contains([question]).all()
    others = [
        LONG.replace("3", "4"),
        LONG.replace("eats 1", "eats 2"),
        SHORT.replace("8", "7"),
        "",
        "Who?",
    ]
    assert not record.contains(others).any()


@pytest.mark.parametrize("question", [LONG, SHORT])
@pytest.mark.parametrize(
    "change",
    [
        str.upper,
        str.lower,
        lambda q: q.replace(" ", "\n\t "),
        lambda q: q.replace("-", "\u2212").replace("'", "\u2019"),
        lambda q: q.replace("$", "\\("),
        lambda q: q.replace("3", "\uff13"),
        lambda q: q.replace(". She", ", she"),
    ],
)
def test_a_question_is_found_in_other_characters(change, question):
    assert (
        Lineage(fingerprints([f"Solve it: {change(question)}\nBe brief."]))
        .contains([question])
        .all()
    )


def test_words_with_capitals_inside_are_found_in_any_case():
    question = "Ben has an iPhone that is 4 years old and takes the measure of pH for Mr. McDonald."
    for text in (question, question.upper(), question.lower(), question + "Please answer."):
        assert Lineage(fingerprints([text])).contains([question]).all()
    question = "Find all of the points on the side AC of the right triangle ABC"
    assert Lineage(fingerprints([question + "Please answer."])).contains([question]).all()


def random_words(random, count):
    return [random.choice("abcdefgh") + random.choice("xyz") for _ in range(count)]


def test_every_run_of_13_tokens_is_found_wherever_it_stands():
    random = Random(0)
    for length in [*range(13, 60), 300] * 4:
        question = random_words(random, length)
        text = (
            random_words(random, random.randrange(40))
            + question
            + random_words(random, random.randrange(40))
        )
        assert Lineage(fingerprints([" ".join(text)])).contains([" ".join(question)]).all()


def test_a_question_with_another_token_inside_is_not_found():
    """Whichever token it is, but for the first and the last."""
    random = Random(1)
    for length in range(13, 60):
        question = random_words(random, length)
        record = Lineage(fingerprints([" ".join(question)]))
        others = []
        for i in range(1, length - 1):
            others.append(" ".join([*question[:i], "other", *question[i + 1 :]]))
        assert record.contains([" ".join(question), *others]).tolist() == [True] + [False] * len(
            others
        )


def test_languages_without_spaces_are_found():
    question = (
        "\u5c0f\u660e\u67093\u4e2a\u82f9\u679c\uff0c\u4ed6\u53c8\u4e70"
        "\u4e865\u4e2a\u3002\u4ed6\u73b0\u5728\u6709\u51e0\u4e2a\u82f9\u679c\uff1f"
    )
    record = Lineage(fingerprints([f"\u8bf7\u89e3\u7b54{question}\u8bf7\u9010\u6b65\u601d\u8003"]))
    assert record.contains([question, question.replace("5", "6")]).tolist() == [True, False]


HOLDS_NOT = [
    LONG.replace("3", "4"),
    "How many are left?",
    "Ann has 3 figs.",
    "",
    LONG.replace("figs", "pears"),
]


@pytest.mark.parametrize("text", HOLDS_NOT)
def test_another_question_or_a_part_of_one_is_not_taken_for_it(text):
    assert not Lineage(fingerprints([text])).contains([LONG]).any()


def test_hashes_are_those_of_all_texts_in_whatever_pieces_they_are_sorted(monkeypatch):
    texts = [f"Number {i}. Is it {i % 7}?" for i in range(50)] * 2
    whole = fingerprints(texts)
    monkeypatch.setattr(lineage, "CHUNK", 7)
    assert (
        np.array_equal(whole, fingerprints(texts))
        and np.array_equal(whole, np.unique(whole))
        and whole.dtype == np.uint64
    )
    assert (
        len(whole) == 50 + 50 + 7
    )  # each text and both of its sentences, of which seven are the same ones
    assert (
        Lineage(whole).contains([texts[0], "Is it 7?", texts[49]]).tolist() == [True, False, True]
        and not Lineage().contains([texts[0]]).any()
    )


# --- chains of runs ------------------------------------------------------------------------------


def test_what_a_chain_of_runs_saw_is_known_from_everywhere(world, capsys, monkeypatch):
    first = ran("A", "--data=three.jsonl")
    ran("B", f"--model={first}", "--data=one.jsonl")
    last = ran("C", "--model=runs/B/checkpoints/step-1", "--data=word_problems")
    assert "trained on 4 of gsm8k's 6 questions" in evaluated(capsys, "runs/C")[0]
    assert (
        "test.jsonl:1" in evaluated(capsys, "runs/A")[0]
        and "trained on 3 of" in evaluated(capsys, "runs/A")[0]
    )
    shutil.copytree(last, world / "copied")
    (world / "runs").rename(world / "archive")
    for name in ("three", "one"):
        (world / f"{name}.jsonl").unlink()
    (world / "elsewhere").mkdir()
    shutil.copytree(world / "sets", world / "elsewhere" / "sets")
    monkeypatch.chdir(world / "elsewhere")
    for place in ("../archive/C", "../archive/C/checkpoints/step-1", "../copied", world / "copied"):
        assert "trained on 4 of gsm8k's 6 questions" in evaluated(capsys, place)[0]
    count, said = evaluated(capsys, "../copied", "--allow_trained")
    assert count == 4 and "WAS TRAINED ON 4 of gsm8k's questions" in said and "AT LEAST" not in said


def test_none_is_said_only_where_all_is_known(world, capsys):
    ran("clean", "--data=clean.jsonl")
    assert evaluated(capsys, "runs/clean") == (0, "")
    # a task that makes its problems has a rule of its own that tells them from its test problems
    for data in ("word_problems", "word_problems:4"):
        folder = ran(data.replace(":", "-"), f"--data={data}")
        assert json.loads((folder / "trained_on.json").read_text())["hashes"] == 0
        assert evaluated(capsys, folder) == (0, "")
    checkpoint(world / "foreign" / "some-model")
    count, said = evaluated(capsys, "foreign/some-model")
    assert count is None and "gsm8k is not known" in said and "some-model" in said
    ran("after", "--data=clean.jsonl", "--model=foreign/some-model")
    count, said = evaluated(capsys, "runs/after")
    assert count is None and "nobody recorded what some-model learned from" in said
    ran("both", "--data=three.jsonl", "--model=foreign/some-model")
    assert "trained on 3 of gsm8k's 6 questions" in evaluated(capsys, "runs/both")[0]
    count, said = evaluated(capsys, "runs/both", "--allow_trained")
    assert count == 3 and "WAS TRAINED ON AT LEAST 3" in said


@pytest.mark.parametrize(
    "damage,said",
    [
        ("no json", "r/step-1 (trained_on.json is missing)"),
        ("no bin", "trained_on.bin is damaged"),
        ("cut json", "trained_on.json is damaged"),
        ("cut bin", "trained_on.bin is damaged"),
        ("other bin", "trained_on.bin is damaged"),
        ("a list", "trained_on.json is damaged"),
        ("no unknown", "trained_on.bin is damaged"),
        ("form 1", "trained_on.json is of another version"),
        ("weights", "its weights changed"),
    ],
)
def test_a_damaged_record_is_unknown(damage, said, capsys):
    folder = ran("r", "--data=clean.jsonl")
    (folder / SUMS).unlink()  # where the files are known, they are refused: tests/test_damage.py
    record, hashes = folder / "trained_on.json", folder / "trained_on.bin"
    stated = json.loads(record.read_text())
    assert stated["unknown"] == [] and stated["hashes"] * 8 == len(hashes.read_bytes())
    if damage.startswith("no "):
        stated.pop("unknown")
        record.write_text(json.dumps(stated)) if damage == "no unknown" else {
            "no json": record,
            "no bin": hashes,
        }[damage].unlink()
    elif damage.startswith("cut"):
        file = {"cut json": record, "cut bin": hashes}[damage]
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "other bin":
        hashes.write_bytes(bytes(len(hashes.read_bytes())))
    elif damage == "form 1":
        record.write_text(json.dumps(stated | {"form": 1}))
    elif damage == "a list":
        record.write_text("[]")
    else:
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-3:] = b"\0\0\0"
        (folder / "model.safetensors").write_bytes(weights)
    count, line = evaluated(capsys, folder)
    assert count is None and said in line


def test_teachers_and_references_count(capsys):
    seen, clean = ran("seen", "--data=three.jsonl"), ran("base", "--data=clean.jsonl")
    kd = ["--mode=kd", f"--teacher={seen}", f"--model={clean}", "--data=word_problems:4"]
    ran("kd", *kd)
    assert "trained on 3 of" in evaluated(capsys, "runs/kd")[0]
    ran("cached", *kd, "--kd_signal=topk", "--kd_topk=4", "--kd_cache=cache")
    assert "trained on 3 of" in evaluated(capsys, "runs/cached")[0]
    rl = [
        "--mode=grpo",
        f"--model={clean}",
        "--data=word_problems:4",
        "--batch_size=2",
        "--grpo_samples=2",
        "--sample_tokens=2",
        "--grpo_kl_coef=0.1",
    ]
    ran("rl", *rl, f"--reference={seen}")
    assert "trained on 3 of" in evaluated(capsys, "runs/rl")[0]
    ran("own", *rl)
    assert evaluated(capsys, "runs/own") == (0, "")


def test_the_embedded_teacher_and_student_are_known(capsys, monkeypatch):
    for name, value in {"steps": 1, "batch_size": 2, "eval_examples": 0}.items():
        monkeypatch.setitem(toy_models.TEACHER, name, value)
    ran("kd", "--mode=kd", "--data=word_problems:4")
    stated = json.load(open("runs/kd/checkpoints/step-1/trained_on.json"))
    assert evaluated(capsys, "runs/kd") == (0, "") and "the toy teacher" in stated["ancestors"]


def test_an_adapter_and_what_is_merged_from_it_know_their_base(world, capsys):
    base = ran("base", "--data=three.jsonl")
    folder = ran("lora", f"--model={base}", "--data=one.jsonl", "--lora_rank=2")
    shutil.copytree(folder, world / "merged")
    for place in ("runs/lora", "merged", folder / "adapter"):
        assert "trained on 4 of" in evaluated(capsys, place)[0]
    # as PEFT would have saved it: nobody knows of the adapter, but of its base
    for name in ("trained_on.json", SUMS):
        (folder / "adapter" / name).unlink()
    assert "trained on 3 of" in evaluated(capsys, folder / "adapter")[0]
    count, said = evaluated(capsys, folder / "adapter", "--allow_trained")
    assert count == 3 and "AT LEAST" in said


def test_a_resumed_run_keeps_what_it_had_seen(capsys, world):
    ran("r", "--data=three.jsonl", "--steps=2", "--save_every=1")
    links = [f"runs/r/checkpoints/step-{i}/trained_on.bin" for i in (1, 2)]
    assert os.stat(links[0]).st_ino == os.stat(links[1]).st_ino  # written once
    shutil.copy(world / "one.jsonl", world / "three.jsonl")  # the file has changed since
    assert train.main(["--name=r", "--runs=runs", "--resume", "--steps=3"]) == 0
    assert RunFolder("runs/r").steps() == [2, 3]
    stated = json.load(open("runs/r/checkpoints/step-3/trained_on.json"))
    assert stated["ancestors"] == ["tiny"]  # not the run itself, as often as it was stopped
    assert "trained on 4 of" in evaluated(capsys, "runs/r")[0]
    assert os.stat("runs/r/checkpoints/step-3/trained_on.bin").st_ino != os.stat(links[1]).st_ino


def test_held_out_questions_are_not_recorded_and_those_seen_before_are_noted(capsys):
    folder = ran("half", "--data=sets/gsm8k/test.jsonl", "--eval_examples=4", "--eval_tokens=2")
    trained = lineage.of_checkpoint("x", folder).contains(QUESTIONS)
    assert trained.sum() == 2 and "trained on 2 of" in evaluated(capsys, "runs/half")[0]
    ran(
        "again",
        f"--model={folder}",
        "--data=sets/gsm8k/test.jsonl",
        "--eval_examples=4",
        "--eval_tokens=2",
    )
    assert "held-out questions" not in capsys.readouterr().out  # the same ones are held out
    ran(
        "other",
        f"--model={folder}",
        "--data=sets/gsm8k/test.jsonl",
        "--eval_examples=5",
        "--eval_tokens=2",
    )
    assert (
        "note: 1 of the 5 validation questions were trained on by what this run begins from"
        in capsys.readouterr().out
    )


def test_questions_in_conversations_count_whatever_is_asked_around_them(capsys, world):

    def turn(role, content):
        return {"role": role, "content": content}

    rows = [
        {
            "messages": [
                turn("system", "Be kind."),
                turn("user", f"{QUESTIONS[0]}\nPut your answer in \\boxed{{}}."),
                turn("assistant", "1"),
            ]
        },
        {
            "messages": [
                turn("user", QUESTIONS[1]),
                turn("assistant", "3"),
                turn("user", "Are you sure?"),
                turn("assistant", "Yes."),
            ]
        },
        {"prompt": f"Question: {QUESTIONS[2]}\nAnswer:", "completion": " 5"},
        {
            "messages": [turn("user", "Hello!"), turn("assistant", QUESTIONS[3])]
        },  # an answer is no question
        {
            "messages": [
                turn("system", f"Answer as here.\n{QUESTIONS[4]} 9."),
                turn("user", "Hm?"),
                turn("assistant", "1"),
            ]
        },
    ]
    jsonl(world / "chat.jsonl", rows)
    ran("chat", "--data=chat.jsonl")
    assert "trained on 4 of" in evaluated(capsys, "runs/chat")[0]
    ran("asked", "--data=clean.jsonl", f"--system_prompt=As here: {QUESTIONS[5]} 11.")
    assert "trained on 1 of" in evaluated(capsys, "runs/asked")[0]


def test_all_turns_but_the_assistants_are_prompts():
    roles = ("system", "user", "assistant", "tool", "developer", "assistant")
    example = Example(
        tuple({"role": role, "content": f"{i} {role}"} for i, role in enumerate(roles))
    )
    asked = {"system_prompt": "Be kind.", "prompt_suffix": " Go."}
    texts = list(record.prompt_texts(asked, [example]))
    assert texts == ["Be kind.", " Go.", "0 system", "1 user", "3 tool", "4 developer"]


# --- traces --------------------------------------------------------------------------------------


def test_traces_bring_what_their_teacher_was_trained_on(world, capsys):
    teacher = ran("teacher", "--data=three.jsonl")
    argv = [
        str(teacher),
        "--data=word_problems:2",
        "--keep=ended",
        "--max_tokens=4",
        "--out=traces",
    ]
    assert traces.main(argv) == 0
    jsonl(
        world / "traces" / "traces.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": "Hm?"},
                    {"role": "assistant", "content": "Ah."},
                ]
            }
        ],
    )  # it wrote nothing
    (world / "traces").rename(world / "moved")
    ran("student", "--data=moved/traces.jsonl")
    ran("by folder", "--data=moved/traces.jsonl", "--model=runs/student/checkpoints/step-1")
    for name in ("student", "by folder"):
        assert "trained on 3 of" in evaluated(capsys, f"runs/{name}")[0]


def test_traces_without_their_record_have_an_unknown_teacher(world):
    messages = ({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ah."})

    class Data:
        validation = []
        sizes = [1]
        columns = {"source": {"teacher": "ab12"}}

        def __len__(self):
            return 1

        def examples(self):
            return [Example(messages, columns=self.columns)]

    asked = dict.fromkeys(lineage.PROMPT_OPTIONS, "")
    assert record.training_record("clean.jsonl", Data(), asked, []).unknown == (
        f"the teacher that wrote {world.name}/clean.jsonl",
    )
    Data.columns = {"source": "the web"}
    assert record.training_record("clean.jsonl", Data(), asked, []).unknown == ()


def test_the_record_of_a_mixture_names_every_file(world):
    def example(source):
        messages = ({"role": "user", "content": "Hm?"}, {"role": "assistant", "content": "Ah."})
        return Example(messages, columns={"source": source})

    class Data:
        validation = []
        sizes = [2, 1]

        def examples(self):
            return [example("the web"), example("the web"), example({"teacher": "ab12"})]

    (world / "more.jsonl").write_text((world / "clean.jsonl").read_text() + "\n")
    asked = dict.fromkeys(lineage.PROMPT_OPTIONS, "")
    found = record.training_record("clean.jsonl:2,more.jsonl", Data(), asked, [])
    names = [f"{world.name}/clean.jsonl", f"{world.name}/more.jsonl"]
    assert [(e["data"], e["examples"]) for e in found.data] == list(zip(names, (2, 1), strict=True))
    assert len({e["sha256"] for e in found.data}) == 2
    assert found.unknown == (f"the teacher that wrote {names[1]}",)


# --- a checkpoint away from its run --------------------------------------------------------------


def test_a_copied_checkpoint_is_asked_as_its_run_was_trained(world, capsys):
    folder = ran("r", "--data=clean.jsonl", "--system_prompt=Be brief.", "--prompt_suffix= Go.")
    shutil.copytree(folder, world / "copied")
    for place in ("runs/r", "copied"):
        evaluated(capsys, place)
        (about,) = (world / "out").glob("*/gsm8k.json")
        asked = json.loads(about.read_text())["identity"]["prompt"]
        assert (asked["system"], asked["instruction"]) == ("Be brief.", " Go.")
