"""Tokenizers, chat templates, datasets and the stream.

The toy ones here, the real Qwen2.5 tokenizer where it is at hand.
"""

import json
from collections import Counter

import numpy as np
import pytest

import toy_models
from data.batch import WEIGHTINGS
from data.dataset import Dataset, DataStream
from data.formats import read_examples, read_rows, to_example
from data.formatter import Formatter
from data.grade import parse_number
from data.order import EpochOrder
from data.split import divide, find_file, find_sources
from data.tasks import TASKS, Example, grade
from data.tokenizer import Tokenizer, build_tiny, shared_vocabulary
from errors import UserError


@pytest.fixture(scope="module")
def tiny():
    return toy_models.toy_tokenizer()


# --- tokenizer -----------------------------------------------------------------------------------


def test_the_embedded_tokenizer_is_lossless_and_the_same_every_time(tiny):
    text = "Mia has 12 apples.\n  Ünïcode – “quotes” 3.14\t<|im_end|>"
    assert tiny.decode(tiny.encode(text)) == text
    toy_models.toy_tokenizer.cache_clear()
    assert toy_models.toy_tokenizer().files == tiny.files
    assert tiny.size <= 512 and tiny.stop_ids() == [
        tiny.encode("<|im_end|>")[0],
        tiny.encode("<|endoftext|>")[0],
    ]


def test_saved_and_loaded_tokenizers_agree(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (
        loaded.encode("Ben has 3") == tiny.encode("Ben has 3")
        and loaded.chat_template == tiny.chat_template
    )
    assert shared_vocabulary(tiny, loaded) == tiny.size


def test_a_folder_without_or_with_a_damaged_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(UserError, match="damaged"):
        Tokenizer.load(tmp_path)


def test_a_merge_at_which_the_library_would_panic_is_one_line(tiny, capfd):
    content = json.loads(tiny.files["tokenizer.json"])
    content["model"] |= {"continuing_subword_prefix": "long", "merges": [["a", "b"]]}
    with pytest.raises(UserError, match="does not begin with 'long'"):
        Tokenizer(tiny.files | {"tokenizer.json": json.dumps(content).encode()}, "here")
    assert capfd.readouterr().err == ""


def test_steps_that_would_fill_the_memory_are_one_line(tiny):
    content = json.loads(tiny.files["tokenizer.json"])

    def loads(**parts):
        text = json.dumps(content | parts)
        return Tokenizer(tiny.files | {"tokenizer.json": text.encode()}, "here")

    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    piece = {"Sequence": {"id": "A", "type_id": 0}}
    template = {"type": "TemplateProcessing", "single": [piece] * 9, "pair": []}
    for part in (
        {"normalizer": {"type": "Sequence", "normalizers": [double] * 40}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "."}, "content": "y" * 20_000}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [byte_level] * 40}},
        {"post_processor": {"type": "Sequence", "processors": [template] * 9}},
        {"decoder": {"type": "Sequence", "decoders": [double] * 40}},
    ):
        with pytest.raises(UserError, match="here: .*damaged .its steps would make"):
            loads(**part)
    quotes = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    assert loads(normalizer={"type": "Sequence", "normalizers": [quotes] * 40})


def test_an_added_token_without_a_name_is_none_in_a_text(tiny):
    content = json.loads(tiny.files["tokenizer.json"])
    content["added_tokens"][0]["content"] = ""
    files = tiny.files | {"tokenizer.json": json.dumps(content).encode()}
    assert Tokenizer(files, "here").escape("ab") == "ab"


def test_a_control_token_that_others_are_made_of_is_one_line(tiny):
    settings = json.loads(tiny.files["tokenizer_config.json"]) | {"eos_token": "n"}
    files = tiny.files | {"tokenizer_config.json": json.dumps(settings).encode()}
    tokenizer = Tokenizer(files, "here")
    with pytest.raises(UserError, match="here: a special token is part of other tokens .*`n`"):
        tokenizer.encode(tokenizer.escape("n"))


def test_shared_vocabulary_is_the_common_prefix_and_other_tokenizers_are_refused(tiny):
    def edited(change):
        parts = json.loads(tiny.files["tokenizer.json"])
        change(parts)
        return Tokenizer(tiny.files | {"tokenizer.json": json.dumps(parts).encode()}, "the other")

    more = edited(
        lambda t: t["added_tokens"].append(
            dict(t["added_tokens"][0], id=tiny.size, content="<new>")
        )
    )
    assert shared_vocabulary(tiny, more) == shared_vocabulary(more, tiny) == tiny.size

    with pytest.raises(UserError, match="pre-tokenizer"):
        shared_vocabulary(tiny, edited(lambda t: t.update(pre_tokenizer=None)))
    with pytest.raises(UserError, match="normalizer"):
        shared_vocabulary(tiny, edited(lambda t: t.update(normalizer=None)))
    with pytest.raises(UserError, match="merges"):
        shared_vocabulary(tiny, build_tiny(["quite another text, with other merges"] * 9))


def test_qwen_tokenizer(real_data):
    qwen = Tokenizer.load(real_data / "qwen2.5-tokenizer")
    assert (
        qwen.size == 151_665
        and qwen.stop_ids() == [151_645, 151_643]
        and qwen.turn_end == "<|im_end|>"
    )
    example = Example(({"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}))
    (d,) = Formatter(qwen).documents([example])
    whole = qwen.render(example.messages)
    assert qwen.decode(d.tokens) + "\n" == whole and "You are Qwen" in whole
    assert qwen.decode(d.tokens[d.weights > 0]) == "4<|im_end|>"
    assert Formatter(qwen).prompt(example) == qwen.encode(
        qwen.render(example.messages[:1], generate=True)
    )


def test_chat_template_equals_transformers(real_data):
    from transformers import AutoTokenizer

    folder = real_data / "qwen2.5-tokenizer"
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi <b> \n"},
        {"role": "assistant", "content": "Ünï"},
    ]
    for messages, generate in ((chat, False), (chat[:2], True), (chat[1:], False)):
        text = ours.render(messages, generate)
        assert text == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]


# --- formatting ----------------------------------------------------------------------------------


def test_every_assistant_turn_is_trained_and_nothing_else(tiny):
    turns = [
        ("system", "S."),
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
        ("assistant", "2"),
    ]
    example = Example(tuple({"role": r, "content": c} for r, c in turns))
    formatter = Formatter(tiny)
    (d,) = formatter.documents([example])
    assert tiny.decode(d.tokens) + "\n" == tiny.render(example.messages)
    assert tiny.decode(d.tokens[d.weights > 0]) == "1<|im_end|>2<|im_end|>"
    assert tiny.decode(formatter.prompt(example)) == tiny.render(
        example.messages[:4], generate=True
    )


def test_plain_template_system_prompt_and_suffix(tiny):
    example = Example(({"role": "user", "content": "Q:"}, {"role": "assistant", "content": " A"}))
    (plain,) = Formatter(tiny, "plain", prompt_suffix=" think").documents([example])
    assert tiny.decode(plain.tokens) == "Q: think A<|endoftext|>"
    assert tiny.decode(plain.tokens[plain.weights > 0]) == " A<|endoftext|>"
    prompt = tiny.decode(
        Formatter(tiny, system_prompt="Be brief.", prompt_suffix="!").prompt(example)
    )
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    assert prompt == f"{system}<|im_start|>user\nQ:!<|im_end|>\n<|im_start|>assistant\n"
    assert example.messages[0]["content"] == "Q:"  # the example itself is left alone


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny):
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}|"
        "{% endfor %}"
    )
    settings = json.dumps({"eos_token": "<|endoftext|>", "chat_template": template}).encode()
    other = Tokenizer(tiny.files | {"tokenizer_config.json": settings}, "x")
    turns = tuple(
        {"role": r, "content": c}
        for r, c in [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    )
    with pytest.raises(UserError, match="rewrites earlier turns"):
        Formatter(other).documents([Example(turns, origin="f:1")])


# --- files ---------------------------------------------------------------------------------------


ROWS = [
    {"question": "Q", "answer": "half is <<48/2=24>>24.\n#### 1,024"},
    {"problem": "P", "solution": "S \\boxed{3}", "answer": "3"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
    {"prompt": "p", "completion": "c"},
]


def write(path, rows):
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_every_form_in_every_container(tmp_path, suffix):
    for i, row in enumerate(ROWS):
        ((origin, back),) = read_rows(write(tmp_path / f"{i}{suffix}", [row]))
        example = to_example(back, origin)
        assert str(tmp_path) in example.origin and [m["role"] for m in example.messages] == [
            "user",
            "assistant",
        ]
        assert (example.task, example.answer) == [
            ("gsm8k", "1,024"),
            ("math", "3"),
            ("", None),
            ("", None),
        ][i]
    assert to_example(ROWS[0], "").messages[1]["content"] == "half is 24.\n#### 1,024"


@pytest.mark.parametrize(
    "answer",
    [
        "y = (x << 2) >> 1;",
        "#### Steps\nAdd <<3>> and 4.",
        "a#### 5",
        "cout << 1+1=2 >> x;\n#### Heading 5",
        "#### 5\nthat is all",
        "#### five",
    ],
)
def test_other_questions_and_answers_are_left_as_they_are(answer):
    example = to_example({"question": "Q", "answer": answer}, "")
    short = (
        answer if answer == "y = (x << 2) >> 1;" else None
    )  # no longer than an answer, so it is one
    assert (example.messages[1]["content"], example.answer) == (answer, short)


@pytest.mark.parametrize(
    "end,answer",
    [
        ("\\boxed{72}", "72"),
        ("\\boxed{1},600", "1,600"),
        ("\\boxed{2}.5", "2.5"),
        ("#### -10", "-10"),
        ("so \\boxed{3} it is", None),
        (None, None),
    ],
)
def test_traces_of_camel(end, answer, tmp_path):
    """The columns of camel-ai/gsm8k_distilled.

    What its makers left of the gold solution's last line is read as GSM8K's.
    """
    trace = (
        "<think>\n48/2 = 24, so 72. \\boxed{7}\n</think>\n\nNatalia sold \\(\\boxed{72}\\) clips."
    )
    row = {
        "source_type": "openai/gsm8k",
        "problem": "How many clips?",
        "reasoning_solution": trace,
        "boxed_answer_success": True,
    }
    row |= {"groud_truth_solution": end and f"48/2 = <<48/2=24>>24 clips in May.\n{end}"}
    for suffix in (".json", ".parquet"):
        ((origin, back),) = read_rows(write(tmp_path / f"records{suffix}", [row]))
        example = to_example(back, origin)
        assert [m["content"] for m in example.messages] == ["How many clips?", trace]
        assert (example.answer, example.task) == (answer, "gsm8k" if answer else "")
    if answer == "72":
        assert grade(example, trace).strict


@pytest.mark.parametrize("gold", ["5", "-5", "1,024", "0.5", "$3.50", "10%", ".5", "7."])
def test_a_last_line_with_a_marked_number_is_gsm8k(gold):
    example = to_example(
        {"question": "Q", "answer": f"It is <<2*.5=1.0>>1 if x << 2.\n#### {gold} \n"}, ""
    )
    assert (example.task, example.answer) == ("gsm8k", gold) and example.messages[1][
        "content"
    ].startswith("It is 1 if x << 2.\n")


def test_every_row_of_the_real_gsm8k_is_one(real_data):
    rows = list(read_rows(real_data / "gsm8k" / "train.jsonl"))
    examples = [to_example(row, origin) for origin, row in rows]
    assert len(examples) == 7473 and {e.task for e in examples} == {"gsm8k"}
    assert all(
        parse_number(e.answer) is not None and "<<" not in e.messages[1]["content"]
        for e in examples
    )
    assert sum("<<" in row["answer"] for _, row in rows) > 7000


@pytest.mark.parametrize(
    "line,words",
    [
        ('{"prompt": "\\ud83d ok", "completion": "b"}', "half a character"),
        ('{"problem": "a", "solution": "b", "answer": "\\ude00"}', "half a character"),
        (
            '{"messages": [{"role": "user", "content": "\\udfff"},'
            ' {"role": "assistant", "content": "a"}]}',
            "half a character",
        ),
        ('{"question": "a", "ans', "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"question": 3, "answer": "x"}', "'question'"),
        ('{"question": "a", "answer": ""}', "'answer'"),
        ('{"problem": "a", "reasoning_solution": 3}', "'reasoning_solution'"),
        ('{"text": "a"}', "fit no known form"),
        ('{"messages": []}', "must be a list of messages"),
        (json.dumps({"messages": [{"role": "user", "content": "x"}] * 1001}), "1,001 messages"),
        ('{"messages": [{"role": "user", "content": 3}]}', "must be a text"),
        ('{"messages": [{"role": "assistant", "content": null}]}', "must be a text"),
        ('{"prompt": "\\ud800 ok"', "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, words, tiny):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "completion": "b"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(UserError) as e:
        [to_example(row, origin) for origin, row in read_rows(path)]
    assert "data.jsonl:2" in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_which_file(tmp_path):
    with pytest.raises(UserError, match="no .jsonl"):
        find_file(str(tmp_path))
    test = write(tmp_path / "test.jsonl", ROWS[:1])
    assert find_file(str(tmp_path)) == test
    train_file = write(tmp_path / "train.jsonl", ROWS[:1])
    assert find_file(str(tmp_path)) == train_file
    write(tmp_path / "train-1.json", ROWS[:1])
    with pytest.raises(UserError, match="which file"):
        find_file(str(tmp_path))
    with pytest.raises(UserError, match="first 1,000"):
        dataset(None, "word_problems:many")
    for missing in ("nowhere.jsonl", "word_problem", str(tmp_path / "x.jsonl")):
        with pytest.raises(UserError, match="no such file"):
            find_file(missing)
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="not a Parquet"):
        list(read_rows(tmp_path / "a.parquet"))


# --- dataset and stream ---------------------------------------------------------------------------


def dataset(tiny, name="word_problems", **more):
    return Dataset(
        name,
        tiny and Formatter(tiny),
        **dict(seed=0, max_tokens=512, vocab=512, eval_examples=5) | more,
    )


def test_held_out_problems_are_never_trained_on(tiny):
    task = TASKS["word_problems"]
    trained = {
        task.example("word_problems", "train", f"{seed}/{i}").messages[0]["content"]
        for seed in range(3)
        for i in range(3000)
    }
    held = {
        task.example("word_problems", "validation", f"0/{i}").messages[0]["content"]
        for i in range(1000)
    }
    assert not trained & held and len(held) > 900


def test_files_are_carved_the_same_whatever_the_seed(tiny, tmp_path):
    path = str(
        write(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "completion": f"c{i}"} for i in range(40)])
    )
    a, b = dataset(tiny, path, seed=1), dataset(tiny, path, seed=2)
    assert [e.origin for e in a.validation] == [e.origin for e in b.validation] and len(a) == 35
    validation = {tiny.decode(d.tokens) for d in a.validation_documents()}
    trained = {tiny.decode(a.get(i).tokens) for i in range(35)}
    assert len(validation) == 5 and len(trained) == 35 and not validation & trained
    assert len(dataset(tiny, path, train_examples=7)) == 7
    with pytest.raises(UserError, match="leaves none"):
        dataset(tiny, path, eval_examples=40)


def test_questions_are_held_out_whole_not_rows(tiny, tmp_path):
    """Several rows of a question (traces, copies): whatever the case, spaces and further turns."""
    spellings = (lambda q: q, lambda q: f"  {q.upper()}\n", lambda q: q.replace(" ", "  "))
    rows = [
        {"prompt": spell(f"what is {i} plus {i}?"), "completion": f"c{i}/{n}"}
        for i in range(30)
        for n, spell in enumerate(spellings)
    ]
    rows += [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": "a"},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "yes"},
            ]
        }
        for i in range(30)
    ]
    examples = read_examples(write(tmp_path / "d.jsonl", rows), "train")
    held_out, (rest,) = divide([examples], 10)

    def questions(examples):
        return {" ".join(e.messages[0]["content"].lower().split()) for e in examples}

    assert len(held_out) == len(questions(held_out)) == 10
    assert not questions(held_out) & questions(rest)
    assert len(rest) == 20 * 4 and len(questions(rest)) == 20
    # nothing is held out: every row is trained on
    assert len(divide([examples], 0)[1][0]) == 120
    first = divide([examples], 4)[0]
    assert [e.origin for e in first] == [e.origin for e in held_out[:4]]
    one = str(
        write(
            tmp_path / "one.jsonl",
            [{"prompt": "the same?", "completion": f"c{n}"} for n in range(9)],
        )
    )
    with pytest.raises(UserError, match="1 different questions"):
        dataset(tiny, one, eval_examples=3)


def test_prompts_alone_and_room_for_what_is_generated(tiny, tmp_path):
    rows = [{"prompt": "p " * n, "answer": "3"} for n in (3, 30, 60)] + [
        {"prompt": "alone", "final_answer": "4"}
    ]
    path = str(write(tmp_path / "d.jsonl", rows))
    with pytest.raises(UserError, match="d.jsonl:4: it ends without an assistant's answer"):
        dataset(tiny, path, eval_examples=0)
    data = dataset(tiny, path, eval_examples=0, completions=False)
    assert len(data) == 4 and all(not data.get(i).weights.any() for i in range(4))
    assert all(
        data.get(i).tokens.tolist() == data.formatter.prompt(data.example(i)) for i in range(4)
    )
    longest = max(len(data.get(i)) for i in range(4))
    room = dict(eval_examples=0, completions=False, max_tokens=longest + 20)
    assert len(dataset(tiny, path, new_tokens=20, **room)) == 4
    with pytest.raises(UserError, match="d.jsonl:3: --sample_tokens 21 and this prompt"):
        dataset(tiny, path, new_tokens=21, **room)
    kept = dataset(tiny, path, new_tokens=21, max_length_policy="drop", **room)
    assert len(kept) == 3 and any("too long" in note for note in kept.notes)
    # a conversation's last prompt counts, not its first
    turns = [("user", "a"), ("assistant", "b " * 40), ("user", "c"), ("assistant", "d")]
    chat = str(
        write(tmp_path / "c.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    )
    with pytest.raises(UserError, match="--sample_tokens 50"):
        dataset(tiny, chat, eval_examples=0, completions=False, max_tokens=100, new_tokens=50)


def test_what_a_user_should_know_of_the_data_is_said(tiny, tmp_path):
    rows = [
        {"prompt": f"p{i}", "completion": "c <|im_end|>" if i == 3 else "c", "source": "x", "id": i}
        for i in range(8)
    ]
    notes = dataset(tiny, str(write(tmp_path / "d.jsonl", rows)), eval_examples=0).notes
    assert "columns of no prompt and no gold answer: id, source" in notes and any(
        "of 1 examples there are names of control tokens" in n for n in notes
    )
    assert dataset(tiny, "word_problems:5", eval_examples=2).notes == []


def test_overlong_and_foreign_ids(tiny, tmp_path):
    path = write(
        tmp_path / "d.jsonl", [{"prompt": "p", "completion": "c " * n} for n in (3, 300, 5)]
    )
    with pytest.raises(UserError, match="d.jsonl:2.*--max_length_policy drop"):
        dataset(tiny, str(path), max_tokens=100, eval_examples=0)
    kept = dataset(tiny, str(path), max_tokens=100, eval_examples=0, max_length_policy="drop")
    assert len(kept) == 2 and kept.dropped.total() == 1
    with pytest.raises(UserError, match="outside the 50 ids"):
        dataset(tiny, str(path), vocab=50, eval_examples=0)


def test_overlong_held_out_examples_are_found_at_once(tiny, tmp_path):
    path = str(
        write(
            tmp_path / "d.jsonl", [{"prompt": f"p{n}", "completion": "c " * n} for n in (300, 3, 5)]
        )
    )
    longest_is_held_out = dict(eval_examples=2, max_tokens=100)
    assert any(
        len(e.messages[1]["content"]) == 600
        for e in dataset(tiny, path, eval_examples=2).validation
    )
    with pytest.raises(UserError, match="d.jsonl:1.*--max_length_policy drop"):
        dataset(tiny, path, **longest_is_held_out)
    kept = dataset(tiny, path, **longest_is_held_out, max_length_policy="drop")
    assert len(kept.validation_documents()) == 1 and kept.dropped.total() == 1


def test_an_endless_task_draws_again_when_problems_are_dropped(tiny):
    a, b = (dataset(tiny, max_tokens=70, max_length_policy="drop") for _ in range(2))
    drawn = [a.get(i) for i in range(60)]
    assert (
        a.dropped.total() > 20
        and max(map(len, drawn)) <= 70
        and len({tuple(d.tokens) for d in drawn}) > 50
    )
    assert all(
        (b.get(i).tokens == d.tokens).all() for i, d in reversed(list(enumerate(drawn)))
    )  # whatever was asked before
    assert all(
        (Formatter(tiny).documents([a.example(i)])[0].tokens == d.tokens).all()
        for i, d in enumerate(drawn)
    )
    with pytest.raises(UserError, match="in a row are longer than --micro_batch_tokens 9"):
        dataset(tiny, max_tokens=9, max_length_policy="drop")
    with pytest.raises(UserError, match="--max_length_policy drop"):
        dataset(tiny, max_tokens=9, eval_examples=0)


def test_options_that_are_no_text_are_refused(tiny):
    with pytest.raises(UserError, match="--prompt_suffix"):
        Formatter(tiny, prompt_suffix=b"\xff".decode("utf-8", "surrogateescape"))


def texts(batch):
    return [tuple(d.tokens.tolist()) for d in batch.documents]


@pytest.mark.parametrize("examples", [0, 10])
def test_the_global_batch_does_not_depend_on_the_ranks(tiny, examples):
    data = dataset(tiny, "word_problems:10" if examples else "word_problems")
    one, *three = [
        DataStream(data, 6, 0, WEIGHTINGS["token"], rank, world)
        for rank, world in ((0, 1), (0, 3), (1, 3), (2, 3))
    ]
    for _ in range(5):
        assert sorted(texts(next(one))) == sorted(t for s in three for t in texts(next(s)))


@pytest.mark.parametrize("examples", [0, 10])
def test_the_stream_resumes_at_the_example_whatever_was_prefetched(tiny, examples):
    data = dataset(tiny, train_examples=examples)
    through, cut, resumed = (DataStream(data, 4, 0, WEIGHTINGS["token"]) for _ in range(3))
    want = [texts(next(through)) for _ in range(9)]
    got = [texts(next(cut)) for _ in range(4)]
    resumed.load(json.loads(json.dumps(cut.state())))
    got += [texts(next(resumed)) for _ in range(5)]
    assert got == want


def test_an_epoch_holds_every_example_once_and_epochs_differ(tiny):
    stream = DataStream(dataset(tiny, train_examples=12), 4, 0, WEIGHTINGS["token"])
    first, second = ([t for _ in range(3) for t in texts(next(stream))] for _ in range(2))
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == len(first)


# --- several files, a file for validation, rows that are left out ---------------------------------


def numbered(path, name, count):
    rows = [{"prompt": f"{name}{i}", "completion": f"c{i}"} for i in range(count)]
    return str(write(path / f"{name}.jsonl", rows))


def drawn(data, seed, count):
    order = data.order(seed)
    return [data.example(order(position)).messages[0]["content"] for position in range(count)]


@pytest.mark.parametrize(
    "name,more,label",
    [
        ("own/mine.jsonl", {}, "mine"),
        ("GSM8K/main/train.jsonl", {}, "gsm8k"),
        ("own/traces.jsonl", {"task": "gsm8k"}, "gsm8k"),
    ],
)
def test_metrics_are_named_by_the_file_unless_it_is_a_public_one(tiny, tmp_path, name, more, label):
    path = tmp_path / "a/b/c" / name  # no folder of pytest's among the last
    path.parent.mkdir(parents=True)
    rows = [{"question": f"{n} + 1?", "answer": f"Well.\n#### {n + 1}"} | more for n in range(4)]
    data = dataset(tiny, str(write(path, rows)), eval_examples=1)
    assert data.label == label and data.validation[0].task == "gsm8k"


def test_files_are_mixed_by_their_weights(tiny, tmp_path):
    a, b = numbered(tmp_path, "a", 30), numbered(tmp_path, "b", 7)
    data = dataset(tiny, f"{a},{b}:0.25", eval_examples=0)
    assert len(data) == 37 and data.sizes == [30, 7] and data.label == "a+b"
    assert any("80.0% from" in note and f"20.0% from {b}" in note for note in data.notes)
    names = drawn(data, 0, 6000)
    shares = Counter(name[0] for name in names)
    assert abs(shares["b"] / 6000 - 0.2) < 0.02
    # every file is gone through in epochs of its own
    for letter, size in (("a", 30), ("b", 7)):
        own = [name for name in names if name[0] == letter]
        epochs = [own[i : i + size] for i in range(0, len(own) - size, size)]
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert epochs[0] != epochs[1]
    assert names != drawn(data, 1, 6000)
    # a position says what is drawn, whatever was asked before
    order = data.order(0)
    for position in (5999, 0, 1024, 1023, 3000, 2047, 2048):
        assert data.example(order(position)).messages[0]["content"] == names[position]
    rare = dataset(tiny, f"{a},{b}:1e-9", eval_examples=0)
    assert {name[0] for name in drawn(rare, 0, 3000)} == {"a"}


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 5, 2**63 - 1])
def test_an_epoch_of_a_single_file_is_drawn_from_seed_and_epoch_alone(seed):
    order = EpochOrder(50, seed)
    for epoch in (0, 1, 5):
        expected = np.random.default_rng([seed, epoch]).permutation(50)
        assert [order(50 * epoch + i) for i in range(50)] == expected.tolist()


def test_a_mixture_resumes_and_does_not_depend_on_the_ranks(tiny, tmp_path):
    a, b, c = (numbered(tmp_path, name, size) for name, size in (("a", 9), ("b", 5), ("c", 4)))
    names = f"{a}:3,{b},{c}"
    data = dataset(tiny, names, eval_examples=3)

    def stream(*place):
        return DataStream(data, 100, 4, WEIGHTINGS["token"], *place)

    one, cut, resumed = stream(), stream(), stream()
    want = [texts(next(one)) for _ in range(25)]
    got = [texts(next(cut)) for _ in range(12)]
    resumed.load(json.loads(json.dumps(cut.state())))
    assert got + [texts(next(resumed)) for _ in range(13)] == want
    shares = [stream(rank, 3) for rank in range(3)]
    for batch in want[:12]:
        assert sorted(batch) == sorted(t for share in shares for t in texts(next(share)))


def test_questions_of_validation_are_in_no_file_of_a_mixture(tiny, tmp_path):
    a = numbered(tmp_path, "a", 20)
    rows = [{"prompt": f" A{i} ", "completion": "other"} for i in range(20)]
    rows += [{"prompt": f"b{i}", "completion": "c"} for i in range(20)]
    data = dataset(tiny, f"{a},{write(tmp_path / 'b.jsonl', rows)}", eval_examples=10)
    held_out = {e.opening.strip().casefold() for e in data.validation}
    trained_on = {e.opening.strip().casefold() for e in data.examples()}
    assert len(held_out) == 10 and not held_out & trained_on and len(trained_on) == 30
    assert len(dataset(tiny, f"{a},{tmp_path / 'b.jsonl'}", train_examples=9)) == 9


@pytest.mark.parametrize(
    "names,words",
    [
        ("{a},{b}:0", "a weight is a number above 0"),
        ("{a},{b}:-1", "a weight is a number above 0"),
        ("{a}:nan,{b}", "a weight is a number above 0"),
        ("{a},{b}:inf", "a weight is a number above 0"),
        ("{a},{b}:half", "no such file"),
        ("{a},", "files are mixed, and '' is none"),
        (",{a}", "files are mixed, and '' is none"),
        ("{a},word_problems:100", "'word_problems' is none"),
        ("word_problems:100,{a}", "'word_problems' is none"),
        ("{a},{b},{a}:2", "named twice"),
        ("{a}:0.5", "--train_examples takes the first"),
        ("{a},{empty}", "empty.jsonl has 0 examples"),
        ("{a},nowhere.jsonl", "--data nowhere.jsonl: no such file"),
    ],
)
def test_mixtures_that_are_none(tiny, tmp_path, names, words):
    paths = {name: numbered(tmp_path, name, 9) for name in "ab"}
    paths["empty"] = str(write(tmp_path / "empty.jsonl", []))
    with pytest.raises(UserError) as e:
        dataset(tiny, names.format(**paths))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_commas_and_colons_in_the_names_of_files(tiny, tmp_path):
    odd = [numbered(tmp_path, name, 9) for name in ("x,y", "z:2")]
    odd[1] = str((tmp_path / "z:2.jsonl").rename(tmp_path / "z.jsonl:2,w.jsonl"))
    plain = numbered(tmp_path, "a", 9)
    assert [s.weight for s in find_sources(odd[0])] == [1]
    sources = find_sources(f"{odd[0]}:2, {odd[1]},{plain}:0.5")
    assert [s.name for s in sources] == [*odd, plain]
    assert [s.weight for s in sources] == [2, 1, 0.5]


def test_a_file_for_validation(tiny, tmp_path):
    a = numbered(tmp_path, "a", 20)
    rows = [{"prompt": f"A{i}", "completion": "x"} for i in range(4)]
    rows += [{"prompt": f"v{i}", "answer": str(i)} for i in range(6)]
    held = str(write(tmp_path / "held.jsonl", rows))
    data = dataset(tiny, a, eval_data=held, eval_examples=100)
    assert len(data.validation) == 10 == len(data.validation_documents())
    assert {e.origin.split(":")[0] for e in data.validation} == {held} and data.label == "held"
    assert len(data) == 16 and any("4 more rows (20.0%) ask one of the 10" in n for n in data.notes)
    some = dataset(tiny, a, eval_data=held, eval_examples=3)
    assert some.validation == data.validation[:3] and len(some) == 16
    for name, words in (
        ("nowhere.jsonl", "--eval_data nowhere.jsonl: no such file"),
        (str(write(tmp_path / "none.jsonl", [])), "has no examples"),
        (a, "has 20 examples; --eval_data .* asks the same: none to train on"),
    ):
        with pytest.raises(UserError, match=words):
            dataset(tiny, a, eval_data=name)
    with pytest.raises(UserError, match="validation problems of its own"):
        dataset(tiny, "word_problems", eval_data=held)


def test_validation_rows_without_an_answer_are_graded_alone(tiny, tmp_path):
    a = numbered(tmp_path, "a", 5)
    rows = [{"problem": f"v{i}", "final_answer": str(i)} for i in range(3)]
    rows.append({"prompt": "v", "completion": "c"})
    data = dataset(tiny, a, eval_data=str(write(tmp_path / "held.jsonl", rows)))
    assert len(data.validation) == 4 and len(data.validation_documents()) == 1


def test_bad_rows_are_errors_or_counted_by_reason(tiny, tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(12)]
    bad = [
        {"prompt": "p", "completion": " "},
        {"prompt": "", "completion": "c"},
        {"messages": []},
        {"prompt": None, "completion": "c"},
        {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": ""}]},
        {"prompt": "an answer is missing"},
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
        {"prompt": "p", "completion": "c " * 200},
    ]
    path = str(write(tmp_path / "d.jsonl", [*rows, *bad]))
    drops = dict(bad_rows="drop", max_length_policy="drop", max_tokens=100)
    data = dataset(tiny, path, eval_examples=0, **drops)
    assert len(data) == 12 and data.notes[-1] == (
        "8 of 20 examples (40.0%) are dropped: 5 empty, 2 without an assistant's answer, "
        "1 too long for --micro_batch_tokens"
    )
    for number, row in enumerate(bad):
        with pytest.raises(UserError, match=r"bad.jsonl:1:.*") as e:
            one = str(write(tmp_path / "bad.jsonl", [row, *rows]))
            dataset(tiny, one, eval_examples=0, max_tokens=100)
        assert "\n" not in str(e.value), number
    # what is malformed is no bad row
    for row in ({"prompt": "p", "completion": 3.5, "context": "c"}, {"messages": [3]}, [1]):
        one = str(write(tmp_path / "bad.jsonl", [row, *rows]))
        with pytest.raises(UserError):
            dataset(tiny, one, eval_examples=0, **drops)
    with pytest.raises(UserError, match="e.jsonl: all its rows are empty or lack"):
        dataset(tiny, str(write(tmp_path / "e.jsonl", bad[:7])), eval_examples=0, **drops)


def test_rows_without_a_gold_answer_where_one_is_needed(tiny, tmp_path):
    golds = ["5", "proof", "7", "8"]
    rows = [{"problem": f"p{i}", "final_answer": gold} for i, gold in enumerate(golds)]
    path = str(write(tmp_path / "d.jsonl", rows))
    needs = dict(eval_examples=0, completions=False)
    assert len(dataset(tiny, path, **needs)) == 4
    with pytest.raises(UserError, match=r"d.jsonl:2: no answer .*\(1 such\).*--bad_rows drop"):
        dataset(tiny, path, gold=True, **needs)
    data = dataset(tiny, path, gold=True, bad_rows="drop", **needs)
    assert len(data) == 3 and data.notes == [
        "1 of 4 examples (25.0%) are dropped: 1 without a gold answer"
    ]
