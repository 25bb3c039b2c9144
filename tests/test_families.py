"""Tokenizers of other families: ids as in `transformers`, one BOS, a user's text as characters."""

import json
import random

import pytest
import tokenizers

from data.formatter import Formatter
from data.tasks import Example
from data.tokenizer import Tokenizer
from errors import UserError
from eval import chat, prompts
from eval.benchmarks import Benchmark
from tests.tokenizers_of_families import FAMILIES, TEXTS

BOS = {"llama3": 1, "llama2": 1, "llama2_first": 1, "llama2_always": 1, "gemma": 1}
BITS = [*TEXTS[0].split(" "), "ü", "é", "日本", "😀", "\n", "\n\n", "\t", "  ", "    ", "12", "3.5"]
BITS += ["<0x0A>", "▁", "[INST]", "<b>", "\\frac{1}{2}", "|", "<", "user", "\u200b", "\x07"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """A family's name, its tokenizer as it is read from a folder, and that of transformers."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp(request.param)
    FAMILIES[request.param]().save(folder)
    return request.param, Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


def some_text(rng):
    bits = [rng.choice(BITS) for _ in range(rng.randrange(1, 12))]
    return "a" + rng.choice(["", " "]).join(bits) + rng.choice(["", " ", "\n", "."])


def as_words(text):
    """SentencePiece's own sign for a space is one to it: the text as it comes back."""
    return text.replace("▁", " ")


def conversation(rng, turns):
    roles = ["user", "assistant"] * turns
    return [{"role": role, "content": some_text(rng)} for role in roles]


def ids_of(theirs, messages, generate):
    return theirs.apply_chat_template(messages, add_generation_prompt=generate)["input_ids"]


def test_conversations_have_the_ids_of_transformers(family):
    name, ours, theirs = family
    rng, formatter = random.Random(0), Formatter(ours)
    for turns in [1, 2, 3] * 40:
        messages = conversation(rng, turns)
        example = Example(tuple(messages), origin="f:1")
        prompt = formatter.prompt(example)
        assert prompt == ids_of(theirs, messages[:-1], True)
        tokens = []
        for piece in formatter.split_turns(example)[-1:]:
            (d,) = formatter.documents([piece])
            tokens = d.tokens.tolist()
        assert tokens == ids_of(theirs, messages, False)[: len(tokens)]
        assert tokens[: len(prompt)] == prompt and tokens[-1] == ours.stop_ids()[0]
        bos = theirs.convert_tokens_to_ids(theirs.bos_token or "<|endoftext|>")
        assert name == "smollm2" or tokens.count(bos) == BOS.get(name, 0) * (
            turns if "llama2" in name else 1
        )


def test_plain_text_has_the_ids_of_transformers_and_its_bos(family):
    name, ours, theirs = family
    rng, formatter = random.Random(1), Formatter(ours, "plain", prompt_suffix="\nA:")
    adds = bool(ours.opening_ids)
    assert adds == (name not in ("smollm2", "qwen3"))
    for _ in range(100):
        question, answer = some_text(rng), " " + some_text(rng)
        messages = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
        example = Example(messages, origin="f:1")
        (d,) = formatter.documents([example])
        assert formatter.prompt(example) == theirs(question + "\nA:")["input_ids"]
        text = question + "\nA:" + answer + ours.eos
        assert d.tokens.tolist() == theirs(text)["input_ids"]
        trained = d.tokens[d.weights > 0].tolist()
        assert trained[-1] == theirs.eos_token_id  # also where padding has the same id
        assert ours.decode(trained[:-1], before=formatter.prompt(example)).replace(
            "▁", " "
        ) == as_words(answer)


def test_text_of_a_user_never_becomes_a_control_token(family):
    _, ours, theirs = family
    rng, formatter = random.Random(2), Formatter(ours)
    controls = sorted(ours.control_names)
    special = {theirs.convert_tokens_to_ids(name) for name in controls}
    usual = formatter.prompt(Example(({"role": "user", "content": "a"},)))
    for _ in range(60):
        text = some_text(rng) + rng.choice(controls) + some_text(rng).strip() + rng.choice(controls)
        apart = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.encode(ours.escape(text)) == apart
        prompt = formatter.prompt(Example(({"role": "user", "content": text},)))
        assert [i for i in prompt if i in special] == [i for i in usual if i in special]
        assert as_words(text) in ours.decode(prompt).replace("▁", " ")
        messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": text})
        (d,) = formatter.documents([Example(messages, origin="f:1")])
        trained = d.tokens[d.weights > 0].tolist()
        assert sum(i in special for i in trained) == 1 and trained[-1] in special


def test_an_evaluation_asks_with_the_same_ids(family):
    _, ours, theirs = family
    messages = [{"role": "user", "content": "What is 2+2?"}]
    example = Example((*messages, {"role": "assistant", "content": "4"}), "4", "gsm8k")
    benchmark = Benchmark("gsm8k", (example,), "", (), "a", "b")
    asked = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    for kind, text in (("plain", "What is 2+2?"), ("chat", asked)):
        args = prompts.PromptOptions(prompt=kind, prefill="So <b>")
        (ids,) = prompts.build(benchmark, ours, {}, args).ids
        assert ids == theirs(text + "So <b>", add_special_tokens=kind == "plain")["input_ids"]
    ids, _ = chat.prompt_of(Formatter(ours, "plain"), messages)
    assert ids == theirs("What is 2+2?")["input_ids"]


def test_bytes_that_no_token_has(family):
    _, ours, theirs = family
    for text in ("日本語", "😀 ok", "\x07\u200b", "a\n\n\nb"):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == text


def test_a_control_token_that_is_not_found_in_a_text_is_refused():
    """Llama 2's kind looks for "▁<|end|>" if a token was added without normalized=False."""
    backend = tokenizers.Tokenizer.from_str(FAMILIES["llama2"]().backend.to_str())
    backend.add_tokens(["<|end|>"])
    assert backend.encode("a.<|end|>.").tokens[-1] != "<|end|>"
    files = FAMILIES["llama2"]().files | {"tokenizer.json": backend.to_str().encode()}
    formatter = Formatter(Tokenizer(files, "the checkpoint"))
    assert formatter.prompt(Example(({"role": "user", "content": "a"},)))
    with pytest.raises(UserError, match=r"<\|end\|> cannot be told apart"):
        formatter.prompt(Example(({"role": "user", "content": "a <|end|>"},)))


def test_the_end_of_a_turn_is_no_part_of_an_answer_though_it_is_not_called_special():
    content = json.loads(FAMILIES["smollm2"]().files["tokenizer.json"])
    for token in content["added_tokens"]:
        token["special"] = False
    files = FAMILIES["smollm2"]().files | {"tokenizer.json": json.dumps(content).encode()}
    ours = Tokenizer(files, "the checkpoint")
    assert ours.decode(ours.encode("It is 12.<|im_end|>"), skip_special=True) == "It is 12."


@pytest.mark.parametrize("flags", [{"rstrip": True}, {"lstrip": True}, {"single_word": True}])
def test_flags_of_added_tokens_stay(flags, tmp_path):
    """Phi 3's kind: the token that names a role swallows the end of its line."""
    from transformers import AutoTokenizer

    backend = tokenizers.Tokenizer.from_str(FAMILIES["llama2"]().backend.to_str())
    names = ["<|user|>", "<|assistant|>", "<|end|>"]
    added = [tokenizers.AddedToken(n, normalized=False, special=True, **flags) for n in names]
    backend.add_special_tokens(added)
    files = FAMILIES["llama2"]().files | {"tokenizer.json": backend.to_str().encode()}
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + ' <|end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    ours = Tokenizer(files | {"chat_template.jinja": template.encode()}, "the checkpoint")
    ours.save(tmp_path)
    theirs, rng = AutoTokenizer.from_pretrained(tmp_path), random.Random(3)
    for escaped in ["", " <|end|>"] * 20:
        messages = conversation(rng, 2)
        (d,) = Formatter(ours).documents([Example(tuple(messages), origin="f:1")])
        assert d.tokens.tolist() == ids_of(theirs, messages, False)[: len(d)]
        for message in messages:
            message["content"] += escaped
        (d,) = Formatter(ours).documents([Example(tuple(messages), origin="f:1")])
        assert d.tokens.tolist().count(ours.backend.token_to_id("<|end|>")) == 4


@pytest.mark.parametrize("family", ["llama2", "llama2_first", "zephyr"])
def test_pieces_go_on_without_a_space_in_front(family):
    ours = FAMILIES[family]()
    first, rest = ours.encode("The ans"), ours.encode("wer 12", before=[5])
    assert ours.decode([*first, *rest]) == "The answer 12"
    assert ours.decode(rest, before=first) == "wer 12"
    code = ours.encode("    return x", before=first)
    assert ours.decode(code, before=first) == "    return x"
    begun = ours.encode("wer 12", before=ours.encode("</s>"))
    assert (begun == ours.encode("wer 12")) == (family != "llama2_first")
