"""Any `tokenizer.json`, the checkpoint's own chat template, and the vocabulary that two models share.

Text of a user stays text: `Tokenizer.escape` marks the control tokens' names in it, so that after the chat
template has put its own control tokens around it, `Tokenizer.encode` makes ids of those and characters of the rest.
"""

import json
import re
import secrets
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path

import tokenizers

from errors import UserError
from files import named, read_text

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
_PROBE = "srlm-probe"
# Behind the first character of a control token's name: that name is a user's text (a private-use character).
_ESCAPE = "\U0010fffd"
# In front of the control tokens that are meant as such, while a text with escapes is encoded. Not to be guessed.
_MARK = f"\U0010fffc{secrets.token_hex(8)}"
# Tags that models write themselves, whatever a tokenizer says of them: no control tokens in an answer.
_ANSWER_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>")
CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>")
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer:
    """Text <-> ids. `files` (name -> bytes) are written beside every checkpoint, unchanged."""

    def __init__(self, files, where):
        self.files, self.where = files, str(where)
        try:
            self.json = json.loads(files["tokenizer.json"])
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
            self.settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        except KeyError:
            raise UserError(
                f"{where} has no tokenizer.json; name a folder that has one with --tokenizer"
            ) from None
        except Exception as e:  # the tokenizers library raises bare Exceptions
            raise UserError(
                f"{where}: the tokenizer files are damaged ({_first_line(e)})"
            ) from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def load(cls, folder):
        folder = Path(folder)
        files = {}
        for name in FILES:
            path = folder / name
            if named(path) and (
                not path.exists() or path.stat().st_size or name == "tokenizer.json"
            ):
                files[name] = read_text(
                    path
                ).encode()  # without a byte order mark, which the tokenizers library does not know
        return cls(files, folder)

    def save(self, folder):
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def id_to_token(self):
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        return {i: token for token, i in vocab.items()}

    @cached_property
    def size(self):
        """One more than the largest id: rows of the head beyond are padding (151,665 of Qwen2.5's 151,936 are real)."""
        return max(self.id_to_token) + 1

    # --- text to ids -----------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which control tokens are control tokens, but where `escape` marked them as a user's."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts."""
        escaped = [i for i, text in enumerate(texts) if _ESCAPE in text]
        if not escaped:
            return [
                e.ids for e in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
            ]
        plain = [text for text in texts if _ESCAPE not in text]
        plain_ids = iter(self._tokenizer.encode_batch(plain, add_special_tokens=False))
        marked = [self._mark_control_tokens(texts[i]) for i in escaped]
        marked_ids = iter(self._marked_tokenizer.encode_batch(marked, add_special_tokens=False))
        return [next(marked_ids if _ESCAPE in text else plain_ids).ids for text in texts]

    def decode(self, ids, skip_special=False):
        """The text of ids; skip_special leaves out special tokens, but not the tags that an answer is marked by."""
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def escape(self, text: str) -> str:
        """A user's text with the control tokens' names in it marked, for `encode` to take them for characters."""
        text = text.replace(_ESCAPE, _ESCAPE + _ESCAPE)
        return self._control_pattern.sub(lambda match: match[0][0] + _ESCAPE + match[0][1:], text)

    def unescape(self, text: str) -> str:
        """What `escape` was given."""
        return re.sub(f"{_ESCAPE}({_ESCAPE}?)", r"\1", text)

    @cached_property
    def control_names(self) -> frozenset[str]:
        """Tokens that no text of a user becomes: those that the tokenizer calls special or names for a purpose, those
        in the form <|...|>, and the one that ends a turn. `<think>` and `<tool_call>` in a text are what they say."""
        added = self.json.get("added_tokens", [])
        names = {
            t["content"] for t in added if t.get("special") or CONTROL_FORM.fullmatch(t["content"])
        }
        names |= {
            token
            for token in self._named_tokens().values()
            if self._tokenizer.token_to_id(token) is not None
        }
        if self.chat_template is not None:
            names.add(self.turn_end)
        return frozenset(names - set(_ANSWER_TAGS))

    @cached_property
    def _control_pattern(self) -> re.Pattern:
        """Any of the control names, the longest first."""
        longest_first = sorted(self.control_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self.json.get("added_tokens", [])
        return frozenset(
            t["id"] for t in added if t.get("special") and t["content"] not in _ANSWER_TAGS
        )

    def _named_tokens(self) -> dict[str, str]:
        """Special tokens that tokenizer_config.json names, as chat templates get them."""
        named = {name: _token(self.settings.get(name)) for name in _NAMED_TOKENS}
        return {name: token for name, token in named.items() if isinstance(token, str) and token}

    def _mark_control_tokens(self, text: str) -> str:
        """The text without escapes, control tokens in the form in which `_marked_tokenizer` knows them."""
        marked = self._control_pattern.sub(lambda match: _MARK + match[0], text)
        return self.unescape(marked)

    @cached_property
    def _marked_tokenizer(self) -> tokenizers.Tokenizer:
        """The same tokenizer, its control tokens under other names: their own names are characters like any."""
        renamed = {name: _MARK + name for name in self.control_names}
        content = json.loads(self.files["tokenizer.json"])
        for token in content.get("added_tokens", []):
            token["content"] = renamed.get(token["content"], token["content"])
        vocab = content["model"].get("vocab")
        if isinstance(vocab, dict):
            content["model"]["vocab"] = {renamed.get(token, token): i for token, i in vocab.items()}
        elif isinstance(vocab, list):
            content["model"]["vocab"] = [
                [renamed.get(token, token), score] for token, score in vocab
            ]
        content["post_processor"] = (
            None  # it names special tokens, and nothing here asks it to add any
        )
        unknown = content["model"].get("unk_token")
        if unknown in renamed:
            content["model"]["unk_token"] = renamed[unknown]
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        for name, other in renamed.items():
            if tokenizer.token_to_id(other) != self._tokenizer.token_to_id(name):
                raise UserError(
                    f"{self.where}: {name} cannot be told apart from text that looks like it"
                )
        return tokenizer

    # --- chat templates --------------------------------------------------------------------------

    @cached_property
    def _templates(self) -> dict[str, str]:
        """Chat templates by their names; one alone is "default"."""
        if "chat_template.jinja" in self.files:
            return {"default": self.files["chat_template.jinja"].decode()}
        found = self.settings.get("chat_template")
        if isinstance(found, list):
            return {template["name"]: template["template"] for template in found}
        return {"default": found} if found else {}

    @property
    def chat_template(self):
        """The template's source, or None."""
        return self._templates.get("default")

    @cached_property
    def template_arguments(self) -> frozenset[str]:
        """The names that the chat templates read and do not set themselves."""
        from jinja2 import meta

        names = set()
        for template in self._compiled_templates.values():
            source = self._templates[template.name]
            names |= meta.find_undeclared_variables(template.environment.parse(source))
        return frozenset(names)

    @cached_property
    def _compiled_templates(self) -> dict:
        return {
            name: _compile(source, name, self.where) for name, source in self._templates.items()
        }

    def render(self, messages, generate=False, tools=None, template_kwargs=None):
        """Messages as the template's text; generate=True ends where the assistant is to begin.

        The template gets what `transformers` gives it: `tools` and `documents` (None where there are none), the
        named special tokens, and `template_kwargs` (`enable_thinking`, ...). Raises UserError.
        """
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise UserError(f"{self.where} has no chat template; use --template plain")
        values = {
            "tools": tools or None,
            "documents": None,
            **self._named_tokens(),
            **(template_kwargs or {}),
        }
        try:
            return self._compiled_templates[name].render(
                messages=[_with_reasoning_names(message) for message in messages],
                add_generation_prompt=generate,
                **values,
            )
        except Exception as e:  # a template is a program of somebody else's
            raise UserError(
                f"{self.where}: the chat template refuses these messages ({_first_line(e)})"
            ) from None

    @cached_property
    def eos(self):
        """The end-of-text token (text)."""
        token = _token(self.settings.get("eos_token"))
        if token is None or self._tokenizer.token_to_id(token) is None:
            raise UserError(
                f"{self.where}: tokenizer_config.json names no eos_token that the tokenizer knows"
            )
        return token

    @cached_property
    def turn_end(self):
        """The token (text) with which the chat template ends an assistant's turn: `<|im_end|>` for Qwen, base models too."""
        text = self.render(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}]
        )
        ids = self._tokenizer.encode(
            text.rpartition(_PROBE)[2].lstrip(), add_special_tokens=False
        ).ids
        special = {t["id"] for t in self.json.get("added_tokens", [])}
        return self.id_to_token[ids[0]] if ids and ids[0] in special else self.eos

    def stop_ids(self):
        """Ids that end a generation: the turn's end first, then end-of-text (Qwen: 151645, 151643)."""
        names = [self.turn_end if self.chat_template else self.eos, self.eos, "<|endoftext|>"]
        ids = [self._tokenizer.token_to_id(name) for name in names]
        return list(dict.fromkeys(i for i in ids if i is not None))


def parse_template_kwargs(text: str, option: str = "--chat_template_kwargs") -> dict:
    """`enable_thinking=false,name=x` or a JSON object as the chat template's arguments. Raises UserError."""
    text = text.strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as e:
            raise UserError(f"{option}: not valid JSON ({e})") from None
    result = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(
                f"{option}: {item.strip()!r}; write name=value,name=value or a JSON object"
            )
        if name in result:
            raise UserError(f"{option}: {name} is there twice; give it one value")
        try:
            result[name] = json.loads(
                value.lower() if value.lower() in ("true", "false", "null", "none") else value
            )
        except ValueError:
            result[name] = None if value.lower() == "none" else value
    return result


def _compile(source: str, name: str, where: str):
    """A chat template in the environment that `transformers` gives it. Raises UserError."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: marks the assistant's text; here it is its text alone."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def raise_exception(message):
        raise TemplateError(message)

    def strftime_now(form):
        return datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        template = environment.from_string(source)
        template.name = name
        return template
    except Exception as e:  # jinja2 raises RecursionError and others beside its own errors
        raise UserError(f"{where}: the chat template is not valid ({_first_line(e)})") from None


def _with_reasoning_names(message: dict) -> dict:
    """Templates read an assistant's reasoning under one of three names; a message carries all of them."""
    reasoning = message.get("reasoning_content")
    return message | {"reasoning": reasoning, "thinking": reasoning} if reasoning else message


def shared_vocabulary(a, b):
    """How many ids two tokenizers share: the longest common id -> token prefix. UserError if they cut text differently.

    Logits of the two models are compared over this prefix, sliced before the softmax; rows beyond it are padding.
    What decides ids is compared, not the files: a tokenizer that was loaded and saved by another version of a library
    has other defaults written out in it.
    """
    parts_a, parts_b = _deciding_parts(a), _deciding_parts(b)
    differing = next((name for name in parts_a if parts_a[name] != parts_b[name]), None)
    if differing and (differing == "merges" or not _cut_alike(a, b)):
        raise UserError(
            f"{a.where} and {b.where} have different tokenizers ({differing}); a teacher must share the student's"
        )
    shared = 0
    while shared in a.id_to_token and a.id_to_token[shared] == b.id_to_token.get(shared):
        shared += 1
    if not shared:
        raise UserError(
            f"{a.where} and {b.where} share no token ids; a teacher must share the student's tokenizer"
        )
    return shared


def _deciding_parts(tokenizer) -> dict:
    """What of a tokenizer decides how a text is cut, in the form in which the library writes it out."""
    content = json.loads(
        tokenizer._tokenizer.to_str()
    )  # older spellings and missing defaults become today's
    model = content.get("model") or {}
    merges = [
        tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or []
    ]
    settings = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    return {
        "normaliser": _without_offsets(content.get("normalizer")),
        "pre-tokenizer": _without_offsets(content.get("pre_tokenizer")),
        "model": settings,
        "merges": merges,
    }


def _without_offsets(part: object) -> object:
    """A part of a tokenizer.json without what only says where in the text a token stands; a sequence of one is that one."""
    if isinstance(part, list):
        return [_without_offsets(item) for item in part]
    if not isinstance(part, dict):
        return part
    result = {
        name: _without_offsets(value) for name, value in part.items() if name != "trim_offsets"
    }
    for members in ("pretokenizers", "normalizers"):
        if result.get("type") == "Sequence" and len(result.get(members, ())) == 1:
            return result[members][0]
    return result


# Texts on which tokenizers that cut differently differ: digits, contractions, case, accents composed and not, scripts,
# white space, line ends, punctuation, emoji, controls.
_CUT_PROBES = [
    "12345 1,234.50 3.14e-10 ٣٤٥ ½ Ⅷ x2y3",
    "I'll can't WON'T it's we'RE d'accord o’clock",
    "Hello  world   a    b",
    " leading and trailing ",
    "a\nb\n\nc\r\nd\t\te\n   f",
    "é e\u0301 Å A\u030a ﬁ ﷺ Ⅷ ①",
    "naïve ÜBER straße İstanbul",
    "日本語のテキスト。中文字符，한국어",
    "Привет мир Ελληνικά עברית العربية हिन्दी ไทย",
    "😀👩‍👩‍👧🏽 ♥️ ✓ →",
    "(a+b)*c/d == e_f != g->h; //x",
    "{'k': [1, 2]}\n\tdef f(x):\n\t\treturn x**2",
    "\u200b\u00a0\u3000\ufeff\u2028|\x00\x1f\x7f",
    "#### \\boxed{\\frac{1}{2}} $x_{1}^{2}$ \\(y\\)",
    "www.example.org/a?b=c&d=%20 user@host",
    "aaaaaaaaaaaaaaaa        ................",
    "_snake_case camelCase PascalCase ABC123abc",
    "",
]


def _cut_alike(a, b) -> bool:
    """Whether two tokenizers whose files differ cut text alike: by the same patterns, on awkward texts alone and joined,
    and on words of the vocabulary in a mixed order."""
    if sorted(_patterns(a.json)) != sorted(_patterns(b.json)):
        return False
    texts = [
        *_CUT_PROBES,
        *(x + y for x, y in zip(_CUT_PROBES, _CUT_PROBES[1:])),
        "".join(_CUT_PROBES),
    ]
    words = [a.decode([i]) for i in sorted(a.id_to_token)]
    texts += ["".join(words[start::997]) for start in range(0, min(997, len(words)), 31)]
    return a.encode_many(texts) == b.encode_many(texts)


def _patterns(part: object) -> Iterator[str]:
    """The regular expressions and texts by which a tokenizer.json splits and replaces."""
    if isinstance(part, dict):
        for name, value in part.items():
            if name == "pattern":
                yield json.dumps(value, sort_keys=True)
            elif name not in ("model", "added_tokens", "decoder", "post_processor"):
                yield from _patterns(value)
    elif isinstance(part, list):
        for value in part:
            yield from _patterns(value)


QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build_tiny(texts, vocab_size=512):
    """A small tokenizer of Qwen2.5's kind (NFC, its pre-tokenizer, byte-level BPE) with a chat template of its form.

    `transformers` loads it as a Qwen2Tokenizer, which brings that pre-tokenizer whatever tokenizer.json says.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    files = {
        "tokenizer.json": tokenizer.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }
    return Tokenizer(files, "the embedded tokenizer")


def _token(value):
    return value.get("content") if isinstance(value, dict) else value


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
