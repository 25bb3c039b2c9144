"""`python -m eval`: samples against `transformers`, what a kill leaves, reports, refusals."""

import json
import os
import re
import shutil
import sys

import pytest

from data.formats import read_examples
from data.split import divide
from data.tokenizer import Tokenizer
from errors import UserError
from eval import __main__ as evaluation
from eval import benchmarks, sampling, summary
from model.generate import generate
from tests.distributed_workers import eval_main, forks, spawned
from tests.evaluation import (
    CODE,
    MATH,
    checkpoint,
    command,
    rows,
    small_sets,
    speaker,
    summary_of,
    trained,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny")


@pytest.fixture
def run(capsys):
    return command(capsys)


# --- samples --------------------------------------------------------------------------------------


def test_greedy_answers_and_scores_equal_those_of_transformers(tmp_path, run, request):
    """The same weights and questions through `transformers`: tokenizer, template, generation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        data = request.getfixturevalue("real_data")
        tokenizer = Tokenizer.load(data / "qwen2.5-tokenizer")
    except pytest.skip.Exception:
        data, tokenizer = small_sets(tmp_path / "sets"), None
    folder, new, out = checkpoint(tmp_path / "c", tokenizer=tokenizer), 6, tmp_path / "out"
    instructions = dict.fromkeys(MATH, benchmarks.BOXED) | dict.fromkeys(CODE, benchmarks.PROGRAM)
    instructions["word_problems"] = ""
    argv = ["--tasks", ",".join(instructions), "--greedy", "--limit=8", f"--max_tokens={new}"]
    code, _, error = run(folder, *argv, "--data", data, "--out", out)
    assert code == 0, error
    theirs = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    seen = set()
    for task, instruction in instructions.items():
        examples, got = benchmarks.load(task, data, 8).examples[:8], rows(out, task)
        for row, example in zip(got, examples, strict=True):
            assert (row["question"], row["gold"]) == (example.question, example.answer)
            asked = [{"role": "user", "content": example.question + instruction}]
            prompt = theirs.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            ids = theirs(prompt, return_tensors="pt", add_special_tokens=False)
            (tokens,) = model.generate(**ids, max_new_tokens=new, do_sample=False)
            tokens = tokens[ids["input_ids"].shape[1] :]
            text = theirs.decode(tokens, skip_special_tokens=True)
            assert (row["text"], row["tokens"]) == (text, len(tokens)), task
            seen.add(text)
            again = sampling.grade_row(example, row | {"text": text})
            assert sampling.grade_row(example, row) == again
    assert len(seen) > 20  # not the same few ids after every prompt


# --- resumption and ranks -------------------------------------------------------------------------

SAMPLED = "--tasks=word_problems --n=3 --k=1,3 --limit=8 --max_tokens=12 --batch_size=5".split()
SAMPLED.append("--temperature=1")


def without(name, rows):
    return [{k: v for k, v in row.items() if k != name} for row in rows]


def same(a, b):
    """Equal samples; the sum of log-probs to what rounding in another batch changes."""
    logp = pytest.approx([row["logp"] for row in b], abs=2e-3)
    return without("logp", a) == without("logp", b) and [row["logp"] for row in a] == logp


def figures(out):
    (found,) = without("tokens_per_second", [summary_of(out)["summaries"][0][2]])
    return found


@pytest.mark.parametrize("group", [0, 2])
def test_a_killed_evaluation_goes_on_with_what_is_missing(group, tiny, tmp_path, run, monkeypatch):
    complete, broken, task = tmp_path / "complete", tmp_path / "broken", "word_problems"
    sampled = [tiny, *SAMPLED, f"--group={group}"]
    assert run(*sampled, "--out", complete)[0] == 0
    written, line = [], sampling.json_line

    def dies(row):
        written.append(row)
        if len(written) > 7:
            raise KeyboardInterrupt
        return line(row)

    monkeypatch.setattr(sampling, "json_line", dies)
    assert run(*sampled, "--out", broken)[0] == 130
    monkeypatch.setattr(sampling, "json_line", line)
    (part,) = broken.glob("*/*.part-0.jsonl")
    part.write_text(part.read_text() + line(written[-1])[:40])  # cut off in the middle of a line
    asked = []

    def counted(model, prompts, *args, **more):
        asked.append(len(prompts))
        return generate(model, prompts, *args, **more)

    monkeypatch.setattr(sampling, "generate", counted)
    assert run(*sampled, "--out", broken)[0] == 0
    assert asked == ([6, 6, 6] if group else [24 - 7]) and not list(broken.glob("*/*.part-*"))
    assert same(rows(broken, task), rows(complete, task))
    if group:  # bit for bit
        assert rows(broken, task) == rows(complete, task)
    assert len({row["text"] for row in rows(complete, task)}) > 20
    assert figures(broken) == figures(complete)
    before = sum(asked)
    # one more sample of each problem
    assert run(*sampled, "--n=4", "--k=1,4", "--out", broken)[0] == 0 and sum(asked) == before + 8
    # nothing is missing; three of the four are shown
    assert run(*sampled, "--out", broken)[0] == 0 and sum(asked) == before + 8
    assert figures(broken) == figures(complete)
    code, _, error = run(*sampled, "--temperature=0.5", "--out", broken)
    assert code == 2 and "another temperature (1.0, now 0.5)" in error and error.count("\n") == 1


def test_two_ranks_write_the_same_samples(tiny, tmp_path, run):
    assert run(tiny, *SAMPLED, "--out", tmp_path / "one")[0] == 0
    two = [str(tiny), *SAMPLED, "--out", str(tmp_path / "two")]
    assert spawned(eval_main, 2, two) == [0, 0]
    assert same(rows(tmp_path / "two", "word_problems"), rows(tmp_path / "one", "word_problems"))
    assert (tmp_path / "two" / "summary.png").stat().st_size > 1000


def test_a_full_disk_is_one_line(tiny, tmp_path, run, monkeypatch):
    def generate(*args, **more):
        raise OSError(28, "No space left on device", "a part")

    monkeypatch.setattr(sampling, "generate", generate)
    code, _, error = run(tiny, *SAMPLED, "--out", tmp_path / "out")
    assert code == 1
    assert error == "eval: a part: No space left on device; the same command goes on\n"


def test_ranks_beside_the_first_say_only_what_failed(tiny, tmp_path, run, monkeypatch):
    monkeypatch.setattr("model.parallel.speaks", lambda: False)
    code, _, error = run(tmp_path / "nowhere", *SAMPLED, "--out", tmp_path / "out")
    assert (code, error) == (2, "")
    test_a_full_disk_is_one_line(tiny, tmp_path, run, monkeypatch)


# --- reports --------------------------------------------------------------------------------------


def test_comparison_of_two_checkpoints(tiny, tmp_path, run, monkeypatch):
    other, out = checkpoint(tmp_path / "other", seed=5), tmp_path / "out"
    base = ["--tasks=gsm8k", f"--data={small_sets(tmp_path / 'sets')}", f"--out={out}"]
    monkeypatch.setattr(sampling, "generate", speaker(lambda i: f"#### {7 + i}"))
    assert run(tiny, *base)[0] == 0
    # right once in three
    monkeypatch.setattr(sampling, "generate", speaker(lambda i: "#### 7"))
    code, printed, _ = run(other, *base, "--compare", tiny)
    assert code == 0
    ((_, _, _, found),) = summary_of(out)["comparisons"]
    assert found["difference"] == pytest.approx(-2 / 3)
    assert (found["better"], found["worse"], found["p"]) == (0, 2, 0.5)
    accuracies = [f["accuracy"][0] for _, _, f in summary_of(out)["summaries"]]
    assert accuracies == pytest.approx([1 / 3, 1])
    assert "-66.7 [" in printed and "-66.7 [" in (out / "summary.md").read_text()


def test_a_summary_keeps_what_earlier_commands_summed_up(tiny, tmp_path, run):
    out, words = tmp_path / "out", "not in this summary"
    argv = ["--limit=2", "--max_tokens=2", "--out", out]
    assert run(tiny, "--tasks=word_problems_talk", "--greedy", *argv)[0] == 0
    ((label, _, talk),) = summary_of(out)["summaries"]
    code, printed, error = run(tiny, "--tasks=word_problems", "--seed=3", *argv)
    assert code == 0, error
    found = summary_of(out)
    assert [s[:2] for s in found["summaries"]] == [
        [label, "word_problems"],
        [label, "word_problems_talk"],
    ]
    assert found["summaries"][1][2] == talk and len(found["trained_on"]) == 2
    earlier = rf"by an earlier command, {label} on word_problems_talk: greedy, up to 2 new"
    for text in (printed, (out / "summary.md").read_text()):
        assert re.search(rf"{label}\W+word_problems_talk", text) and re.search(earlier, text)
        assert re.search("temperature 0.6, top-p 0.95, seed 3", text) and words not in text
    # evaluated again, it is not an earlier one any more
    assert run(tiny, "--tasks=word_problems_talk", "--greedy", *argv)[0] == 0
    (names, conditions), found = summary_of(out)["earlier"][0], summary_of(out)
    assert names == [[label, "word_problems"]] and "seed 3" in conditions[0]
    assert len(found["summaries"]) == 2 and len(found["earlier"]) == 1
    (out / "summary.json").unlink()
    code, printed, _ = run(tiny, "--tasks=word_problems", "--seed=3", *argv)
    assert re.search(rf"{words}, though beside it: {label} on word_problems_talk$", printed, re.M)


def test_comparisons_of_earlier_commands_stay_while_both_sides_do(tmp_path):
    def report(names, comparisons):
        return summary.Report(
            ["how"], [], [summary.Summary(*n, None) for n in names], comparisons, []
        )

    old = report([("a", "t"), ("b", "t"), ("a", "u")], [])
    old.comparisons = [
        summary.Comparison(*three, {}) for three in (("a", "b", "t"), ("c", "a", "u"))
    ]
    found = report([("b", "t")], []).beside(old)
    assert [c[:3] for c in found.comparisons] == [("c", "a", "u")]
    assert found.earlier == [([("a", "t"), ("a", "u")], ["how"])]
    assert found.beside(report([("d", "t")], [])).earlier[0][0] == [("d", "t")]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_pipe_that_nobody_reads_ends_no_evaluation(encoding, tiny, tmp_path, run, monkeypatch):
    """Nor does a terminal that has no such letters, which is read here."""
    monkeypatch.setattr("progress.EVERY", -1.0)
    read, write = os.pipe()
    if encoding == "utf-8":
        os.close(read)
    argv = [tiny, "--tasks=word_problems", "--greedy", "--limit=1", "--max_tokens=2"]
    with monkeypatch.context() as m, open(write, "w", encoding=encoding) as stream:
        m.setattr(sys, "stdout", stream)
        assert evaluation.main([*map(str, argv), f"--out={tmp_path / 'out'}", "--system=é"]) == 0
    assert summary_of(tmp_path / "out")["summaries"]
    if encoding == "ascii":
        assert b"system '\\xe9'" in os.read(read, 1 << 16)
        os.close(read)


def test_a_damaged_summary_is_refused_before_the_work(tiny, tmp_path, run):
    out = tmp_path / "out"
    argv = [tiny, "--tasks=word_problems", "--greedy", "--limit=2", "--max_tokens=2", "--out", out]
    assert run(*argv)[0] == 0
    path = out / "summary.json"
    path.write_text(path.read_text().replace('"word_problems"', '"word_problemz"', 1))
    (samples,) = out.glob("*/*.jsonl")
    samples.unlink()
    code, _, error = run(*argv)
    assert code == 2 and "summary.json is damaged" in error and error.count("\n") == 1
    assert not samples.exists()


def test_a_damaged_sample_is_made_again_and_read_by_nobody_else(tiny, tmp_path, run):
    argv = [tiny, *SAMPLED, "--group=1", "--out", tmp_path / "out"]
    assert run(*argv)[0] == 0
    (path,) = (tmp_path / "out").glob("*/*.jsonl")
    whole = path.read_text()
    path.write_text(whole.replace('"strict": false', '"strict": true ', 1))
    with pytest.raises(UserError, match=r"jsonl:\d+ is damaged; the command that made it"):
        summary.Samples(path.parent, path.stem).read()
    assert run(*argv)[0] == 0 and path.read_text() == whole


def evaluate_beside(argv, barrier, codes):
    barrier.wait()
    codes.put(evaluation.main(argv))


def test_who_wants_the_same_samples_waits(tiny, tmp_path, run, monkeypatch):
    argv = [tiny, *SAMPLED, "--out", tmp_path / "out"]
    assert run(*argv)[0] == 0
    (path,) = (tmp_path / "out").glob("*/*.jsonl")

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("locks.time.sleep", interrupted)
    for kept, word in ((path, "samples"), (tmp_path / "out" / "summary.json", "summary")):
        held = summary.Samples(kept.parent, kept.stem)
        with held.locked():
            code, printed, _ = run(*argv)
        assert code == 130 and "waiting for another evaluation" in printed, word


@pytest.mark.slow
def test_two_commands_in_one_folder_lose_nothing(tiny, tmp_path, run):
    """The same samples, more of them, and another task, at the same time."""
    out, context = tmp_path / "out", forks()
    argv = [str(tiny), *SAMPLED, "--out", str(out)]
    commands = [argv, argv, [*argv, "--n=4", "--k=1,4"], [*argv, "--tasks=word_problems_talk"]]
    barrier, codes = context.Barrier(len(commands)), context.SimpleQueue()
    processes = [
        context.Process(target=evaluate_beside, args=(a, barrier, codes)) for a in commands
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [codes.get() for _ in processes] == [0] * 4
    assert run(*argv, "--out", tmp_path / "one")[0] == 0
    found = [row for row in rows(out, "word_problems") if row["sample"] < 3]
    assert same(found, rows(tmp_path / "one", "word_problems"))
    assert len(rows(out, "word_problems")) == 32 and len(rows(out, "word_problems_talk")) == 24
    assert len(summary_of(out)["summaries"]) == 2
    left = {p.name for p in out.rglob("*") if ".part-" in p.name or p.name.endswith(".draft")}
    assert not left


def test_samples_of_other_conditions_are_not_summed_up(tmp_path):
    """Another command began in the same folder while this one was generating."""
    ours, theirs = (summary.Samples(tmp_path / "c", "gsm8k") for _ in range(2))
    ours.folder.mkdir()
    ours.begin({"temperature": 0.6}, {})
    (tmp_path / "c" / "gsm8k.json").unlink()
    theirs.begin({"temperature": 1.0}, {})
    with pytest.raises(UserError, match="another temperature"):
        ours.finish({}, 0, 0.0)
    assert not (tmp_path / "c" / "gsm8k.jsonl").exists()


# --- what is refused ------------------------------------------------------------------------------


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_that_a_run_trained_on_are_refused_unless_asked_for(tmp_path, run):
    data, asked = tmp_path / "mix.jsonl", " how much  is 8?"
    clean = [{"question": f"What is {i}+1?", "answer": f"#### {i + 1}"} for i in range(4)]
    write_lines(data, [*clean, {"question": asked, "answer": "#### 3"}])
    seen = trained(tmp_path, "seen", data)
    # another one that began from the first
    start = f"--model={seen / 'checkpoints' / 'step-1'}"
    after = trained(tmp_path, "after", "word_problems", start)
    base = ["--tasks=word_problems,gsm8k", "--greedy", "--limit=2", "--max_tokens=2"]
    base += [f"--data={small_sets(tmp_path / 'sets')}", f"--out={tmp_path / 'out'}"]
    for folder in (seen, after):
        code, _, error = run(folder, *base)
        assert code == 2 and "trained on 1 of gsm8k's 3 questions" in error
        assert "test.jsonl:2" in error and "mix.jsonl" in error and error.count("\n") == 1
    assert run(trained(tmp_path, "clean", "word_problems:10"), *base)[0] == 0
    code, out, _ = run(seen, *base, "--allow_trained")
    assert code == 0 and "WAS TRAINED ON 1 of gsm8k's questions" in out
    for count in (1, 2, 3, 4):  # a question that the run only validated on was not trained on
        validation = [
            example.question for example in divide([read_examples(data, "train")], count)[1][0]
        ]
        folder = trained(tmp_path, f"validation-{count}", data, f"--eval_examples={count}")
        assert run(folder, *base)[0] == (2 if asked in validation else 0)


def mbpp_row(number, **more):
    row = {"task_id": number, "prompt": f"Add {number}.", "code": "def f(x): return x"}
    return row | {"test_list": ["assert f(1) == 1"]} | more


def test_mbpp_keeps_to_its_split_and_is_refused_where_a_run_did_not(tmp_path, run):
    """A run on MBPP's own file has seen no test problem; one on other ids or forms is found out."""
    own, sets = tmp_path / "sets" / "mbpp" / "test.json", tmp_path / "sets"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps([mbpp_row(number) for number in range(9, 612)]))
    examples = benchmarks.load("mbpp", sets).examples
    assert len(examples) == 500 and len(read_examples(own, "train")) == 11
    other, asked = tmp_path / "other.json", tmp_path / "asked.json"
    other.write_text(json.dumps([mbpp_row(9, task_id=700), mbpp_row(16, task_id=701)]))
    question = {"prompt": examples[3].question, "completion": "def f(x): return x"}
    asked.write_text(json.dumps([question]))
    argv = ["--tasks=mbpp", "--greedy", "--limit=1", "--max_tokens=2", f"--data={sets}"]
    for name, data, count in (("own", own, 0), ("other", other, 1), ("asked", asked, 1)):
        folder = trained(tmp_path, name, data)
        code, _, error = run(folder, *argv, f"--out={tmp_path / 'out'}")
        assert code == (2 if count else 0), error
        assert not count or f"trained on {count} of mbpp's 500 questions" in error


@pytest.fixture(scope="module")
def wrong(tiny, tmp_path_factory):
    """Checkpoints and test sets with something wrong, and good ones, as {name: folder}."""
    home = tmp_path_factory.mktemp("wrong")
    small_sets(home / "sets")
    for name in ("bare", "no_template", "yarn"):
        shutil.copytree(tiny, home / name)
    (home / "bare" / "tokenizer.json").unlink()
    (home / "no_template" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    config = json.loads((tiny / "config.json").read_text())
    config["rope_scaling"] = {"type": "yarn", "factor": 4.0}
    (home / "yarn" / "config.json").write_text(json.dumps(config))
    for name, content in (("broken", "{"), ("foreign", '{"text": "a"}\n'), ("empty", "")):
        (home / name / "svamp").mkdir(parents=True)
        (home / name / "svamp" / "test.jsonl").write_text(content)
    (home / "foreign" / "humaneval").mkdir()
    shutil.copy(home / "sets" / "mbpp" / "test.jsonl", home / "foreign" / "humaneval")
    (home / "two" / "svamp").mkdir(parents=True)
    for name in ("test.jsonl", "test.json"):
        (home / "two" / "svamp" / name).write_text("[]")
    names = ("sets", "bare", "no_template", "yarn", "broken", "foreign", "empty", "two")
    folders = {name: home / name for name in names}
    return folders | {"tiny": tiny, "none": home / "none"}


# in {braces}: a folder of `wrong`
NO_TOKENIZER = "no tokenizer.json; name a folder that has one with --tokenizer"
NO_TEMPLATE = "no chat template; use --prompt plain"
YARN = "rope scaling 'yarn' is not supported"
REFUSED = (
    ("{tiny} --tasks gsm9k", "did you mean gsm8k?"),
    ("{tiny} --tasks chess", "choose from gsm8k, svamp"),
    ("{tiny} --tasks ,", "names none"),
    ("{tiny} --tasks mawps", "no 'mawps'"),
    ("{tiny}", "--tasks"),
    ("--tasks gsm8k", "CHECKPOINT"),
    ("{tiny} --tasks gsm8k --n 2 --k 1,4", "--k 4 needs as many samples"),
    ("{tiny} --tasks gsm8k --k a", "--k: 'a' is not a whole number"),
    ("{tiny} --tasks gsm8k --group -1", "--group must be at least 0"),
    ("{tiny} --tasks gsm8k --k 0", "--k must be at least 1"),
    ("{tiny} --tasks gsm8k --n 0", "--n must be at least 1"),
    ("{tiny} --tasks gsm8k --greedy --n 4", "--greedy"),
    ("{tiny} --tasks gsm8k --temperature 0", "--greedy"),
    ("{tiny} --tasks gsm8k --top_p 0", "--top_p must be above 0"),
    ("{tiny} --tasks gsm8k --max-tokens 0", "--max_tokens must be at least 1"),
    ("{tiny} --tasks gsm8k --prompt fancy", "few_shot"),
    ("{bare} --tasks gsm8k", NO_TOKENIZER),
    ("tiny --tasks gsm8k", "preset"),
    ("{none} --tasks gsm8k", "no such folder"),
    ("{yarn} --tasks gsm8k", YARN),
    ("{no_template} --tasks gsm8k --prompt chat", NO_TEMPLATE),
    ("{tiny} --tasks svamp --data {none}", "no test set there"),
    ("{tiny} --tasks svamp --data {two}", "which file of"),
    ("{tiny} --tasks svamp --data {broken}", "not valid JSON"),
    ("{tiny} --tasks svamp --data {foreign}", "not a row of svamp"),
    ("{tiny} --tasks humaneval --data {foreign}", "not a row of humaneval"),
    ("{tiny} --tasks svamp --data {empty}", "is empty"),
    ("{tiny} --tasks gsm8k --compare {none}", "no such folder"),
)


@pytest.mark.parametrize("argv,words", REFUSED, ids=[argv for argv, _ in REFUSED])
def test_wrong_inputs_are_one_line(argv, words, wrong, tmp_path, run):
    good = ["--data", wrong["sets"], "--out", tmp_path / "out", "--max_tokens=2"]
    code, out, error = run(*good, *argv.format(**wrong).split())
    assert code == 2 and words in error and error.count("\n") == 1 and not out, error
    assert not (tmp_path / "out").exists()  # refused before anything is written


def test_a_checkpoint_without_a_tokenizer_takes_another_ones(wrong, tiny, tmp_path, run):
    argv = ["--tasks=gsm8k", "--greedy", "--max_tokens=2", "--tokenizer", tiny]
    argv += ["--data", wrong["sets"], "--out", tmp_path / "out"]
    assert run(wrong["bare"], *argv)[0] == 0
