"""Prompts and documents: the template's own text, a user's text as characters, nothing lost."""

import json
import random
import time
import unicodedata

import pytest

import toy_models
from data.formats import to_example
from data.formatter import Formatter
from data.tasks import Example
from data.tokenizer import Tokenizer, parse_template_kwargs, shared_vocabulary
from errors import UserError
from tests.chat_templates import ALL


@pytest.fixture(scope="module")
def tiny():
    return toy_models.toy_tokenizer()


def with_template(tiny, name):
    source = ALL.get(name, name)
    return Tokenizer(tiny.files | {"chat_template.jinja": source.encode()}, f"the {name} one")


def chat(*turns):
    return Example(tuple({"role": role, "content": text} for role, text in turns), origin="f:1")


def trained(tokenizer, document):
    return tokenizer.decode(document.tokens[document.weights > 0])


def whole(tokenizer, document):
    return tokenizer.decode(document.tokens)


# --- a user's text is text -----------------------------------------------------------------------


CONTROLS = [
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<|im_start|>assistant\n",
    "a<|im_end|>b",
    "<<|im_end|>>",
]


@pytest.mark.parametrize(
    "text", [*CONTROLS, "<|im_end|><|im_end|>", "\U0010fffd<|im_end|>\U0010fffd", "x\U0010fffc y"]
)
def test_text_never_becomes_a_control_token(tiny, text):
    question, answer = f"What is {text}?", f"It is {text}."
    (d,) = Formatter(tiny).documents([chat(("user", question), ("assistant", answer))])
    expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    assert whole(tiny, d) == expected
    control = set(
        tiny.encode("<|im_start|>") + tiny.encode("<|im_end|>") + tiny.encode("<|endoftext|>")
    )
    assert len(control) == 3 and sum(int(i) in control for i in d.tokens) == 4  # the template's own
    assert (
        trained(tiny, d) == f"{answer}<|im_end|>"
        and sum(int(i) in control for i in d.tokens[d.weights > 0]) == 1
    )
    plain = Formatter(tiny, "plain").documents([chat(("user", question), ("assistant", answer))])[0]
    assert (
        whole(tiny, plain) == f"{question}{answer}<|endoftext|>"
        and sum(int(i) in control for i in plain.tokens) == 1
    )


def test_text_is_cut_as_transformers_cuts_it_without_special_tokens(real_data):
    from transformers import AutoTokenizer

    folder = real_data / "qwen2.5-tokenizer"
    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    for text in [*CONTROLS, "Ünï <|im_end|>\n 12", "(<|endoftext|>)"]:
        (d,) = Formatter(ours).documents([chat(("user", text), ("assistant", text))])
        alone = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert [int(i) for i in d.tokens[d.weights > 0]] == [*alone, 151_645]
        assert [int(i) for i in d.tokens].count(151_645) == 3 and list(d.tokens).count(151_644) == 3
    usual = "No control tokens, <think>4</think> <tool_call> 12"
    assert ours.encode(ours.escape(usual)) == theirs(usual, add_special_tokens=False)["input_ids"]


def test_a_vocabulary_that_holds_its_control_tokens_as_words(tiny):
    """SentencePiece's kind: <eos> is a word of the model's own vocabulary, and added besides."""
    content = json.loads(tiny.files["tokenizer.json"])
    for token in content["added_tokens"]:
        content["model"]["vocab"].setdefault(token["content"], token["id"])
    content["model"]["ignore_merges"] = True
    other = Tokenizer(tiny.files | {"tokenizer.json": json.dumps(content).encode()}, "the other")
    (d,) = Formatter(other).documents(
        [chat(("user", "Is <|im_end|> it?"), ("assistant", "<|endoftext|>"))]
    )
    assert whole(other, d).startswith("<|im_start|>user\nIs <|im_end|> it?<|im_end|>")
    assert [int(i) for i in d.tokens].count(tiny.encode("<|im_end|>")[0]) == 2
    assert tiny.encode("<|endoftext|>")[0] not in d.tokens


# --- templates -----------------------------------------------------------------------------------


def test_templates_get_what_transformers_gives_them(tiny, tmp_path):
    from transformers import AutoTokenizer

    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": "Ünï <b>", "parameters": {"type": "object"}},
        }
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "ü"}}}
    conversations = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "reasoning_content": "r", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "4"},
        ],
    ]
    sources = ALL | {
        "environment": "{{ bos_token }}{{ eos_token }}{% for m in messages %}{% generation %}"
        "{{ {'z': m.content, 'a': [1]} | tojson(indent=2, sort_keys=true) }}"
        "{% endgeneration %}{% if loop.first %}{% continue %}{% endif %}"
        "{{ strftime_now('%Y') }}{% endfor %}",
        "absent": "{{ tools is none }} {{ documents is none }} {{ tools is defined }} "
        "{{ enable_thinking is defined }}{{ enable_thinking }}",
        "names": "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|"
        "{{ m.content }}{% endfor %}",
    }
    compared = 0
    for name, source in sources.items():
        ours = with_template(tiny, source)
        folder = tmp_path / name
        folder.mkdir()
        ours.save(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        for messages in conversations:
            for generate in (False, True):
                for given, kwargs in ((None, {}), (tools, {}), (None, {"enable_thinking": False})):
                    try:
                        want = theirs.apply_chat_template(
                            messages,
                            tools=given,
                            tokenize=False,
                            add_generation_prompt=generate,
                            **kwargs,
                        )
                    except Exception:  # templates that do not know tools' messages
                        continue
                    assert ours.render(messages, generate, given, kwargs) == want, (
                        name,
                        messages,
                        generate,
                    )
                    compared += 1
    assert compared > 150


@pytest.mark.parametrize(
    "messages,kwargs,text,learnt",
    [
        # Qwen3's kind: an answer without reasoning is trained with the empty block of the template
        ("Q=It is 12.", {}, "<think>\n\n</think>\n\nIt is 12.", "<think>\n\n</think>\n\nIt is 12."),
        (
            "Q=<think>\nthree fours\n</think>\n\n12",
            {},
            "<think>\nthree fours\n</think>\n\n12",
            "<think>\nthree fours\n</think>\n\n12",
        ),
        ("Q=<think>close</think>12", {}, "<think>close</think>12", "<think>close</think>12"),
        # ... and where the generation prompt holds that block, it is not trained on
        (
            "Q=It is 12.",
            {"enable_thinking": False},
            "<think>\n\n</think>\n\nIt is 12.",
            "It is 12.",
        ),
    ],
)
def test_reasoning_is_trained_as_the_template_writes_it(tiny, messages, kwargs, text, learnt):
    other = with_template(tiny, "reasoning")
    question, _, answer = messages.partition("=")
    formatter = Formatter(other, template_kwargs=kwargs)
    example = chat(("user", question), ("assistant", answer))
    (d,) = formatter.documents([example])
    assert (
        whole(other, d) == f"<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n{text}<|im_end|>"
    )
    assert trained(other, d) == learnt + "<|im_end|>"
    prompt = formatter.prompt(example)
    assert (
        list(d.tokens[: len(prompt)]) == prompt
        and (d.weights[: len(prompt)] == 0).all()
        and (d.weights[len(prompt) :] == 1).all()
    )


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("template", ["reasoning", "opened"])
def test_reasoning_in_a_field_of_its_own(tiny, field, template):
    other = with_template(tiny, template)
    row = {
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", field: "three fours", "content": "12"},
        ]
    }
    formatter = Formatter(other)
    (d,) = formatter.documents([to_example(row, "f:1")])
    expected = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert whole(other, d) == expected + "<think>\nthree fours\n</think>\n\n12<|im_end|>"
    with pytest.raises(
        UserError, match="f:1: .*no place for 'three fours' of the assistant's reasoning_content"
    ):
        Formatter(tiny).documents([to_example(row, "f:1")])
    with pytest.raises(UserError, match="f:1: plain text has no place for 'reasoning_content'"):
        Formatter(tiny, "plain").documents([to_example(row, "f:1")])


@pytest.mark.parametrize(
    "answer,learnt",
    [
        ("<think>\nthree fours\n</think>\n\n12", "three fours\n</think>\n\n12"),
        ("<think>three fours</think>12", "three fours</think>12"),
        ("three fours\n</think>\n12", "three fours\n</think>\n12"),
        ("It is 12.", "\n</think>\n\nIt is 12."),
    ],
)
def test_a_generation_prompt_that_opens_the_reasoning(tiny, answer, learnt):
    other = with_template(tiny, "opened")
    formatter = Formatter(other)
    example = chat(("user", "Q"), ("assistant", answer))
    (d,) = formatter.documents([example])
    assert trained(other, d) == learnt + "<|im_end|>"
    assert whole(other, d).count("<think>") == 1 and whole(other, d).count("</think>") == 1
    assert formatter.opened(example) == "<think>" and other.decode(
        formatter.prompt(example)
    ).endswith("<think>\n")
    assert len(formatter.closed) == (answer == "It is 12.")


def test_a_short_text_has_a_place_of_its_own_whatever_white_space_is_around_it(tiny):
    """By its length without that: else "z" took its place in "zum"."""
    turns = [("user", "one"), ("assistant", "zum"), ("user", "z" + "\n" * 9)]
    assert Formatter(with_template(tiny, "trimmed")).prompt(chat(*turns))


def test_a_finished_block_is_not_doubled(tiny):
    formatter = Formatter(
        with_template(tiny, "reasoning"), template_kwargs={"enable_thinking": False}
    )
    with pytest.raises(UserError, match="enable_thinking=true"):
        formatter.documents([chat(("user", "Q"), ("assistant", "<think>r</think>12"))])


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}


@pytest.mark.parametrize("content", ["", None, "I look it up."])
@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'])
def test_tool_calls_are_trained_on(tiny, content, arguments):
    other = with_template(tiny, "tools")
    call = CALL | {"function": {"name": "weather", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
    ]
    turns += [
        {"role": "tool", "tool_call_id": "c1", "content": "4 C"},
        {"role": "assistant", "content": "It is 4 C."},
    ]
    example = to_example({"messages": turns, "tools": TOOLS}, "f:1")
    (d,) = Formatter(other).documents([example])
    said = f"{content}\n" if content else ""
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    called = f"{said}<tool_call>\n{call}\n</tool_call><|im_end|>"
    assert trained(other, d) == called + "It is 4 C.<|im_end|>"
    assert "You may call:" in whole(other, d) and "<tool_response>\n4 C" in whole(other, d)
    (as_text,) = Formatter(other).documents(
        [to_example({"messages": turns, "tools": json.dumps(TOOLS)}, "f:1")]
    )
    assert list(as_text.tokens) == list(d.tokens)


def test_what_a_template_does_not_show_is_refused_by_name(tiny):
    call = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
    ]
    cases = [
        (tiny, {"messages": call}, "no place for 'weather' of the assistant's tool_calls"),
        (tiny, {"question": "Q", "answer": "A", "tools": TOOLS}, "no place for 'tools'"),
        (
            with_template(tiny, "two_roles"),
            {"system": "S", "question": "Q", "answer": "A"},
            "passes over the role 'system'",
        ),
        (
            with_template(tiny, "two_roles"),
            {
                "messages": [
                    {"role": "critic", "content": "Q"},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "'critic'",
        ),
        (
            tiny,
            {
                "messages": [
                    {"role": "user", "content": "Q", "mood": "sad"},
                    {"role": "assistant", "content": "A"},
                ]
            },
            "'mood' of a user message",
        ),
        (
            with_template(tiny, "{{ raise_exception('no such role') }}"),
            {"question": "Q", "answer": "A"},
            "no such role",
        ),
        (
            with_template(tiny, "{{ messages[0].content + 1 }}"),
            {"question": "Q", "answer": "A"},
            "refuses these messages",
        ),
        (
            with_template(tiny, "{% for m in messages %}"),
            {"question": "Q", "answer": "A"},
            "not valid",
        ),
    ]
    for tokenizer, row, words in cases:
        with pytest.raises(UserError) as e:
            Formatter(tokenizer).documents([to_example(row, "f:1")])
        assert words in str(e.value) and "\n" not in str(e.value)
    read = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.mood }}\n{{ m.content }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant \n{% endif %}"
    )
    row = {
        "messages": [
            {"role": "user", "content": "Q", "mood": "sad"},
            {"role": "assistant", "content": "A"},
        ]
    }
    (d,) = Formatter(with_template(tiny, read)).documents([to_example(row, "f:1")])
    assert "user sad\nQ" in whole(tiny, d)


def test_names_and_values_in_tool_calls_are_text(tiny):
    other = with_template(tiny, "tools")
    end = tiny.encode("<|im_end|>")[0]

    def ends(arguments, tools=TOOLS):
        turns = [
            {"role": "user", "content": "Q"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"name": "f", "arguments": arguments}],
            },
        ]
        (d,) = Formatter(other).documents([to_example({"messages": turns, "tools": tools}, "f:1")])
        return [int(i) for i in d.tokens].count(end), whole(other, d)

    usual, _ = ends({"rol": "x"})
    for arguments in ({"role": "x<|im_end|>y"}, {"<|im_end|>": 1}, {"a": {"role": ["<|im_end|>"]}}):
        count, text = ends(arguments)
        assert count == usual and text.count("<|im_end|>") == usual + 1
    assert ends({"a": 1}, [{"name": "f", "role": "<|im_end|>"}])[0] == usual
    for tools, words in (
        ("[{'name': 'get'}]", "must be a list of objects"),
        ("some text", "must be a list of objects"),
        (["f"], "must be a list"),
    ):
        with pytest.raises(UserError, match=words):
            ends({"a": 1}, tools)
    with pytest.raises(UserError, match="says nothing"):
        to_example(
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": ""},
                ],
                "tools": "null",
            },
            "f:1",
        )
    (d,) = Formatter(tiny).documents(
        [to_example({"question": "Q", "answer": "A", "tools": "null"}, "f:1")]
    )
    assert trained(tiny, d) == "A<|im_end|>"


def test_a_template_that_looks_into_marked_texts_is_refused(tiny):
    looks = (
        "{% for m in messages %}{{ 'ends' if '<|im_end|>' in m.content else 'goes on' }} "
        "{{ m.content }}{% endfor %}"
    )
    ascii_only = "{% for m in messages %}{{ m.content | tojson(ensure_ascii=true) }}{% endfor %}"
    for source in (looks, ascii_only):
        formatter = Formatter(with_template(tiny, source))
        assert formatter.prompt(chat(("user", "Ünï?")))
        with pytest.raises(UserError, match="looks into texts that hold names of control tokens"):
            formatter.prompt(chat(("user", "a <|im_end|> b")))


def test_tags_of_an_answer_are_kept_where_the_tokenizer_calls_them_special(tiny):
    content = json.loads(tiny.files["tokenizer.json"])
    size = tiny.size
    for i, tag in enumerate(["<think>", "</think>", "<answer>", "</answer>"]):
        content["added_tokens"].append(dict(content["added_tokens"][0], id=size + i, content=tag))
    other = Tokenizer(tiny.files | {"tokenizer.json": json.dumps(content).encode()}, "the other")
    text = "<think>r</think><answer>2</answer>"
    ids = other.encode(text)
    assert (
        min(ids[0], ids[-1]) >= size
        and other.decode([*ids, other.encode("<|im_end|>")[0]], skip_special=True) == text
    )
    (d,) = Formatter(other).documents([chat(("user", "<think>?"), ("assistant", text))])
    assert [int(i) for i in d.tokens].count(size) == 2


def test_tokens_that_are_not_special_stay_in_what_is_read(tiny):
    content = json.loads(tiny.files["tokenizer.json"])
    content["added_tokens"].append(
        dict(content["added_tokens"][0], id=tiny.size, content="<|file_sep|>", special=False)
    )
    other = Tokenizer(tiny.files | {"tokenizer.json": json.dumps(content).encode()}, "the other")
    ids = other.encode("a<|file_sep|>b<|im_end|>")
    assert tiny.size in ids and other.decode(ids, skip_special=True) == "a<|file_sep|>b"
    assert tiny.size not in other.encode(other.escape("a<|file_sep|>b"))


def test_arguments_that_no_template_reads_are_refused(tiny):
    other = with_template(tiny, "reasoning")
    with pytest.raises(UserError, match="reads no 'enable_thinkin'; did you mean enable_thinking"):
        Formatter(other, template_kwargs={"enable_thinkin": False})
    row = {
        "question": "Q",
        "answer": "A",
        "chat_template_kwargs": {"custom_instructions": "Be brief."},
    }
    with pytest.raises(UserError, match="reads no 'custom_instructions'"):
        Formatter(other).documents([to_example(row, "f:1")])
    with pytest.raises(UserError, match="plain text has no place for 'chat_template_kwargs'"):
        Formatter(tiny, "plain").documents([to_example(row, "f:1")])


def test_plain_text_holds_no_conversation(tiny):
    with pytest.raises(UserError, match="several turns"):
        Formatter(tiny, "plain").documents(
            [chat(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]
        )
    formatter = Formatter(tiny, "plain", prompt_suffix="\nAssistant: <think>")
    (d,) = formatter.documents([chat(("user", "Q"), ("assistant", "<think>r</think>A"))])
    assert (
        whole(tiny, d) == "Q\nAssistant: <think>r</think>A<|endoftext|>"
        and formatter.opened(chat(("user", "Q"))) == "<think>"
    )


def test_long_conversations_take_no_time_of_their_own(tiny):
    turns = [
        (role, f"{role} {i} " + "some words " * 50)
        for i in range(60)
        for role in ("user", "assistant")
    ]
    began = time.process_time()
    pieces = Formatter(tiny).segments(chat(*turns))
    assert len(pieces) == 120 and time.process_time() - began < 10


# --- turns ---------------------------------------------------------------------------------------


def test_turns_with_weight_0_are_not_trained_on(tiny):
    for flag in ({"weight": 0}, {"loss": False}, {"train": False}, {"training": False}):
        turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "5"} | flag]
        turns += [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "No: 4."}]
        (d,) = Formatter(tiny).documents([to_example({"messages": turns}, "f:1")])
        assert trained(tiny, d) == "No: 4.<|im_end|>" and "assistant\n5<|im_end|>" in whole(tiny, d)
        (last,) = Formatter(tiny).documents([to_example({"messages": turns[:2]}, "f:1")])
        assert not last.weights.any() and whole(tiny, last).endswith("5<|im_end|>")
    half = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4", "weight": 0.5},
    ]
    (d,) = Formatter(tiny).documents([to_example({"messages": half}, "f:1")])
    assert set(d.weights.tolist()) == {0.0, 0.5}


def test_a_template_that_rewrites_turns_gives_each_its_own_document(tiny):
    other = with_template(tiny, "reasoning")
    example = chat(
        ("user", "a"),
        ("assistant", "<think>\nr1\n</think>\n\nb"),
        ("user", "c"),
        ("assistant", "<think>\nr2\n</think>\n\nd"),
    )
    formatter = Formatter(other)
    first, second = formatter.split_turns(example)
    one, two = formatter.documents([first, second])
    assert trained(other, one) == "<think>\nr1\n</think>\n\nb<|im_end|>"
    assert trained(other, two) == "<think>\nr2\n</think>\n\nd<|im_end|>"
    assert whole(other, two).startswith(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"
    )
    assert Formatter(tiny).split_turns(example) == [
        example
    ]  # one document, where nothing is rewritten
    assert list(two.tokens[: len(formatter.prompt(example))]) == formatter.prompt(example)


def test_the_prompt_of_a_conversation_without_an_answer_is_all_of_it(tiny):
    example = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    assert not example.has_answer
    (d,) = Formatter(tiny).documents([example])
    assert not d.weights.any() and list(d.tokens) == Formatter(tiny).prompt(example)
    assert whole(tiny, d) == tiny.render(example.messages, generate=True)


def test_a_row_brings_arguments_of_its_own(tiny):
    formatter = Formatter(
        with_template(tiny, "reasoning"), template_kwargs={"enable_thinking": False}
    )
    row = {
        "question": "Q",
        "answer": "A",
        "chat_template_kwargs": {"enable_thinking": True, "python_tools": None},
    }
    (own,) = formatter.documents([to_example(row, "f:1")])
    (of_the_run,) = formatter.documents([to_example({"question": "Q", "answer": "A"}, "f:2")])
    assert (
        trained(tiny, own) == "<think>\n\n</think>\n\nA<|im_end|>"
        and trained(tiny, of_the_run) == "A<|im_end|>"
    )
    assert whole(tiny, own) == whole(tiny, of_the_run)


def test_template_arguments():
    assert parse_template_kwargs("enable_thinking=false, n=3,name=x") == {
        "enable_thinking": False,
        "n": 3,
        "name": "x",
    }
    assert parse_template_kwargs('{"a": [1]}') == {"a": [1]} and parse_template_kwargs("") == {}
    assert parse_template_kwargs("a=None,b=True") == {"a": None, "b": True}
    for bad in ("enable_thinking", "=3", "a b=1", "{", "[1]", "n=3,n=4"):
        with pytest.raises(UserError, match="--chat_template_kwargs"):
            parse_template_kwargs(bad)


# --- tokenizers that are the same ----------------------------------------------------------------


def test_a_tokenizer_saved_by_another_version_is_the_same(tiny, tmp_path):
    from transformers import AutoTokenizer

    tiny.save(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    saved = Tokenizer.load(tmp_path / "again")

    def edited(**changes):
        content = json.loads(tiny.files["tokenizer.json"])
        for path, value in changes.items():
            at = content
            *way, last = path.split("__")
            for step in way:
                at = at[int(step)] if step.isdigit() else at[step]
            at[int(last) if last.isdigit() else last] = value
        return Tokenizer(tiny.files | {"tokenizer.json": json.dumps(content).encode()}, "the other")

    merges = json.loads(tiny.files["tokenizer.json"])["model"]["merges"]
    same = [
        saved,
        edited(pre_tokenizer__pretokenizers__1__trim_offsets=True),
        edited(pre_tokenizer__pretokenizers__1__trim_offsets=False),
        edited(model__merges=[" ".join(pair) for pair in merges]),
        edited(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
    ]
    for other in same:
        assert shared_vocabulary(tiny, other) == shared_vocabulary(other, tiny) == tiny.size
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": False,
    }
    different = [
        edited(pre_tokenizer__pretokenizers__1=byte_level),
        edited(normalizer={"type": "NFKC"}),
        edited(normalizer={"type": "Lowercase"}),
        edited(pre_tokenizer__pretokenizers__0__pattern={"Regex": r"\p{N}{1,3}|[^\p{N}]+"}),
        edited(model__merges=merges[:-5]),
    ]
    for other in different:
        with pytest.raises(UserError, match="different tokenizers"):
            shared_vocabulary(tiny, other)


# --- every form, every template, nothing lost ----------------------------------------------------


WORDS = [
    "Mia",
    "has",
    "12",
    "apples.",
    "\n",
    "  ",
    "ünï",
    "日本",
    "😀",
    "<b>",
    '"q"',
    "{x}",
    "\\frac{1}{2}",
    "#### 5",
    "</s>",
    "\t",
]
HOSTILE = [
    *CONTROLS,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "{{ 7*7 }}",
    "{% raw %}",
    "[INST]",
    "\U0010fffd",
]
UNKNOWN_COLUMNS = ["context", "options", "images", "id", "source", "level"]
UNKNOWN_FIELDS = ["mood", "name", "id", "refusal"]


def some_text(rng, hostile=0.15):
    return " ".join(
        rng.choice(HOSTILE if rng.random() < hostile else WORDS) for _ in range(rng.randint(1, 6))
    ) + rng.choice("abc")


def some_message(rng, role):
    message = {"role": role, "content": some_text(rng)}
    if role == "assistant":
        if rng.random() < 0.2:
            message[rng.choice(["reasoning_content", "reasoning", "thinking"])] = some_text(rng)
        if rng.random() < 0.15:
            message["tool_calls"] = [
                {"function": {"name": f"f{rng.randint(0, 9)}", "arguments": {"k": some_text(rng)}}}
            ]
        if rng.random() < 0.2:
            message[rng.choice(["weight", "loss", "train"])] = rng.choice([0, 1])
    if rng.random() < 0.08:
        message[rng.choice(UNKNOWN_FIELDS)] = rng.choice([None, "yes"])
    return message


def some_row(rng):
    kind = rng.randrange(7)
    if kind == 0:
        row = {
            "question": some_text(rng),
            "answer": rng.choice([some_text(rng), 12, some_text(rng) + "\n#### 12"]),
        }
    elif kind == 1:
        row = {"problem": some_text(rng), "solution": some_text(rng)} | (
            {"answer": "3"} if rng.random() < 0.5 else {}
        )
    elif kind == 2:
        row = {"prompt": some_text(rng), "completion": some_text(rng)}
    elif kind == 3:
        row = {
            "instruction": some_text(rng),
            "input": rng.choice(["", some_text(rng)]),
            "output": some_text(rng),
        }
    elif kind == 4:
        row = {
            "conversations": [
                {"from": f, "value": some_text(rng)} for f in ("human", "gpt") * rng.randint(1, 2)
            ]
        }
    else:
        roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(1, 3)
        row = {"messages": [some_message(rng, role) for role in roles]}
    if rng.random() < 0.15:
        row[rng.choice(UNKNOWN_COLUMNS)] = rng.choice([None, "x"])
    if rng.random() < 0.1:
        row["system"] = some_text(rng)
    return row


def texts_of(value):
    """Every text that a row says, roles and the names of fields aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, part in value.items():
            if name not in ("role", "from", "id", "name", "refusal"):
                yield from texts_of(part)
    elif isinstance(value, list):
        for part in value:
            yield from texts_of(part)


def refused_on_purpose(row):
    """Why a row may be refused: a part that no known form or simple template has a place for."""
    texts = json.dumps(row, ensure_ascii=False)
    parts = [
        *UNKNOWN_COLUMNS[:3],
        *(f'"{name}": "yes"' for name in UNKNOWN_FIELDS),
        "tool_calls",
        "reason",
        "thinking",
        "think>",
        '"system"',
    ]
    return any(part in texts for part in parts)


def check_row(row, formatter, controls):
    """Trained on as written, or refused in one line. Returns whether it was trained on."""
    try:
        example = to_example(json.loads(json.dumps(row)), "f:1")
        documents = formatter.documents(formatter.split_turns(example))
    except UserError as e:
        assert str(e).startswith("f:1") and "\n" not in str(e) and refused_on_purpose(row), (
            row,
            str(e),
        )
        return False
    assert not any(row.get(name) for name in UNKNOWN_COLUMNS[:3]), row
    decode = formatter.tokenizer.decode
    text = unicodedata.normalize("NFC", "\n".join(decode(d.tokens) for d in documents))
    for name in (
        ("id", "source", "level", "answer") if "solution" in row else ("id", "source", "level")
    ):
        row = {k: v for k, v in row.items() if k != name}
    for said in texts_of(row):
        said = unicodedata.normalize("NFC", said.strip())
        in_json = json.dumps(said, ensure_ascii=False)[1:-1]
        if said.startswith("<think>") and formatter.opened(
            example
        ):  # the tag is the prompt's, with its own line end
            said = said.removeprefix("<think>").strip()
        assert said in text or in_json in text, (row, "LOST", said, text)
    # every control token is the template's: turns open and close as often as the template says
    for d in documents:
        ids = [int(i) for i in d.tokens]
        count = [ids.count(control) for control in controls]
        opened, closed = count[:2]
        assert count[2] == 0 and opened in (closed, closed + 1), (row, decode(ids))
        learnt = [int(i) for i, w in zip(d.tokens, d.weights, strict=True) if w]
        assert controls[0] not in learnt and learnt.count(controls[1]) <= sum(
            m["role"] == "assistant" for m in example.messages
        )
    return True


@pytest.mark.parametrize("template", ["own", *ALL])
def test_rows_of_every_form_are_trained_on_as_written_or_refused(tiny, template, rows=300):
    tokenizer = tiny if template == "own" else with_template(tiny, template)
    formatter = Formatter(tokenizer)
    controls = [tiny.encode(name)[0] for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")]
    rng = random.Random(f"rows/{template}")
    kept = sum(check_row(some_row(rng), formatter, controls) for _ in range(rows))
    assert 0.3 * rows < kept < rows


@pytest.mark.slow
@pytest.mark.parametrize("template", ["own", *ALL])
def test_ten_thousand_rows(tiny, template):
    test_rows_of_every_form_are_trained_on_as_written_or_refused(
        tiny, template, rows=10_000 // (1 + len(ALL)) + 1
    )


@pytest.mark.parametrize(
    "name, content, trained",
    [
        ("reasoning", "<think>\nr1 still going", "<think>\nr1 still going"),
        ("opened", "<think>\nr1 still going", "r1 still going"),
        ("opened", "<think>r1 still going", "r1 still going"),
        ("opened", "r1 still going", "r1 still going"),
    ],
)
def test_what_did_not_stop_is_trained_on_as_it_was_written(name, content, trained, tiny):
    answer = {"role": "assistant", "content": content, "truncated": True}
    row = {"messages": [{"role": "user", "content": "q"}, answer]}
    pieces = Formatter(with_template(tiny, name), "chat").segments(to_example(row, "x"))
    assert [piece.text for piece in pieces][1:] == [trained]
