"""Any `tokenizer.json`, with the checkpoint's own chat template.

Text of a user stays text: `Tokenizer.escape` marks the control tokens' names in it, so that after
the chat template has put its own control tokens around it, `Tokenizer.encode` makes ids of those
and characters of the rest.

A document is encoded in pieces. Tokenizers of SentencePiece's kind put a space in front of a text
("4" is `▁4`); a piece that goes on from others gets none, as if the whole were encoded at once.
"""

import json
import re
import secrets
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from data.chat_template import ChatTemplates, parse_template_kwargs
from data.vocabulary import shared_vocabulary
from errors import UserError
from files import Fields, Json, named, read_text, reason

__all__ = ["Tokenizer", "build_tiny", "parse_template_kwargs", "shared_vocabulary"]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
PROBE = "srlm-probe"
# Behind the first character of a control token's name: that name is a user's text. (This character
# and the next are private-use ones.)
ESCAPE = "\U0010fffd"
# In front of the control tokens that are meant as such, while a text with escapes is encoded. Not
# to be guessed.
MARK = f"\U0010fffc{secrets.token_hex(8)}"
# Tags that models write themselves, whatever a tokenizer says of them: no control tokens.
ANSWER_TAGS = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>"}
CONTROL_FORM = re.compile(r"<[|｜].+[|｜]>")
STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
MOST_GROWTH = 10_000  # of a text, by all steps; Llama's make it 8 times as long at most
SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Tokenizer:
    """Text <-> ids.

    Args:
        files: name -> content; written beside every checkpoint, unchanged.
        source: The folder, or words for it, for errors.
    """

    def __init__(self, files: dict[str, bytes], source: str | Path):
        self.files, self.source = files, str(source)
        if "tokenizer.json" not in files:
            raise UserError(
                f"{source} has no tokenizer.json; name a folder that has one with --tokenizer"
            )
        try:
            self.json = json.loads(files["tokenizer.json"])
            config = json.loads(files.get("tokenizer_config.json", b"{}"))
            json.dumps(config, ensure_ascii=False).encode()  # no half of a character
            self.settings = Fields(config, "tokenizer_config.json").values
            _check_merges(self.json["model"])
            steps = [self.json.get(name) for name in STEPS]
            if _growth(steps) > MOST_GROWTH:
                raise ValueError("its steps would make a text of a character as long as a book")
            self.backend = _build(files["tokenizer.json"].decode())
            self._variants = {(False, False): self.backend}
        except Exception as e:  # the tokenizers library raises bare Exceptions
            raise UserError(f"{source}: the tokenizer files are damaged ({reason(e)})") from None

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Read the tokenizer of a checkpoint's folder. Raises UserError."""
        files = {}
        for name in FILES:
            path = Path(folder) / name
            is_empty = path.exists() and not path.stat().st_size
            if named(path) and (not is_empty or name == "tokenizer.json"):
                # without a byte order mark, which the tokenizers library does not know
                files[name] = read_text(path).encode()
        return cls(files, folder)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files, as they were read."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def id_to_token(self) -> dict[int, str]:
        vocab = self.backend.get_vocab(with_added_tokens=True)
        return {i: token for token, i in vocab.items()}

    @cached_property
    def size(self) -> int:
        """One more than the largest id.

        Rows of a model's head beyond are padding: 151,665 of Qwen2.5's 151,936 are real.
        """
        return max(self.id_to_token) + 1

    # --- text to ids -----------------------------------------------------------------------------

    @cached_property
    def opening_ids(self) -> list[int]:
        """What the post-processor puts in front of a text: BOS, or nothing.

        A chat template writes BOS itself if it wants one.
        """
        encoding = self.backend.encode("a")
        return encoding.ids[: [*encoding.special_tokens_mask, 0].index(0)]

    def encode(self, text: str, before: Sequence[int] = ()) -> list[int]:
        """Ids of a text.

        Names of control tokens become control tokens, but where `escape` marked them as a user's.

        before: The ids that the text goes on from; none where it begins a document.
        """
        return self.going_on(text, self.encode_many([text])[0], before)

    def encode_many(self, texts: Sequence[str], bare: bool = False) -> list[list[int]]:
        """`encode` of several texts, each at the beginning of a document.

        bare: Without the space that the tokenizer puts in front of a text.
        """
        found = {}
        for marked in (False, True):
            group = [text for text in texts if (ESCAPE in text) == marked]
            if not group:
                continue
            given = group
            if marked:  # control tokens get the names that this variant knows
                pattern = self._control_pattern
                given = [self.unescape(pattern.sub(rf"{MARK}\g<0>", text)) for text in group]
            backend = self._variant(marked, bare)
            encoded = backend.encode_batch(given, add_special_tokens=False)
            found |= zip(group, encoded, strict=True)
        return [found[text].ids for text in texts]

    def going_on(self, text: str, ids: list[int], before: Sequence[int]) -> list[int]:
        """`encode(text, before)`, given the ids that the text has at a document's beginning."""
        if len(before) and int(before[-1]) in self._swallowing_ids:
            text = text.lstrip()
            (ids,) = self.encode_many([text])
        if self._begins(before):
            return ids
        (bare,) = self.encode_many([text], bare=True)
        return bare[: self._first_added(bare)] + ids[self._first_added(ids) :]

    def decode(
        self, ids: Sequence[int], skip_special: bool = False, before: Sequence[int] = ()
    ) -> str:
        """The text of ids.

        skip_special: Leave out special tokens and the end of a turn, but not the tags that mark an
            answer.
        before: The ids that these go on from.
        """
        backend = self._variant(bare=not self._begins(before))
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        return backend.decode(list(ids), skip_special_tokens=False)

    def escape(self, text: str) -> str:
        """Mark the control tokens' names in a user's text, for `encode` to take for characters."""

        def mark(name: re.Match) -> str:
            return name[0][0] + ESCAPE + name[0][1:]

        return self._control_pattern.sub(mark, text.replace(ESCAPE, ESCAPE + ESCAPE))

    def is_plain(self, json_text: str) -> bool:
        """Whether `escape` changes no text in some JSON; False where nobody can tell."""
        if ESCAPE in json_text or not self._names_are_plain:
            return False
        return not self._control_pattern.search(json_text)

    @cached_property
    def _names_are_plain(self) -> bool:
        """Whether control tokens are written in JSON as they are."""
        return all(json.dumps(n, ensure_ascii=False) == f'"{n}"' for n in self.control_names)

    def unescape(self, text: str) -> str:
        """What `escape` was given."""
        return re.sub(f"{ESCAPE}({ESCAPE}?)", r"\1", text)

    @cached_property
    def control_names(self) -> frozenset[str]:
        """Tokens that no text of a user becomes.

        Those that the tokenizer calls special or names for a purpose, those in the form <|...|>,
        and the one that ends a turn. `<think>` and `<tool_call>` in a text are what they say.
        """
        names = []
        if self.chat_template is not None:
            names.append(self.turn_end)
        for token in self._added:
            if token.get("special") or CONTROL_FORM.fullmatch(token["content"]):
                names.append(token["content"])
        for name in self._named_tokens.values():
            if self.backend.token_to_id(name) is not None:
                names.append(name)
        return frozenset(filter(None, names)) - ANSWER_TAGS

    @cached_property
    def _control_pattern(self) -> re.Pattern:
        """Any of the control names, the longest first."""
        longest_first = sorted(self.control_names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def _added(self) -> list[dict]:
        """The tokens that are no result of merging: `content`, `id`, `special`."""
        return self.json.get("added_tokens", [])

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        """The special tokens, and what ends a turn whatever tokenizer.json says of it."""
        special = [token for token in self._added if token.get("special")]
        ids = [token["id"] for token in special if token["content"] not in ANSWER_TAGS]
        return frozenset(ids + self.stop_ids())

    # --- pieces of a document --------------------------------------------------------------------

    @cached_property
    def _bare_parts(self) -> Json:
        """The parts of tokenizer.json that put a space in front of a text, in a form that does not.

        With the decoder that takes this space away again. {} if the tokenizer puts none.
        """
        bare = {}
        for name in ("normalizer", "pre_tokenizer", "decoder"):
            bare[name] = _without_prefix(self.json.get(name))
        if all(bare[name] == self.json.get(name) for name in ("normalizer", "pre_tokenizer")):
            return {}
        return bare

    def _begins(self, before: Sequence[int]) -> bool:
        """Whether a text behind these ids is encoded as at the beginning of a document."""
        if not len(before) or not self._bare_parts:
            return True
        return self._prefixes_each and int(before[-1]) in self._added_ids

    @cached_property
    def _prefixes_each(self) -> bool:
        """Whether the space comes in front of text behind an added token, too."""
        _, *behind = self.encode(self.eos + "a")
        return behind == self.encode("a")

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(token["id"] for token in self._added)

    @cached_property
    def _swallowing_ids(self) -> frozenset[int]:
        """Added tokens that take the white space behind them into themselves."""
        return frozenset(token["id"] for token in self._added if token.get("rstrip"))

    def _first_added(self, ids: list[int]) -> int:
        """The place of the first added token, or the end."""
        for place, i in enumerate(ids):
            if i in self._added_ids:
                return place
        return len(ids)

    def _variant(self, marked: bool = False, bare: bool = False) -> tokenizers.Tokenizer:
        """The same tokenizer in another form.

        marked: its control tokens under other names, so that their own are characters like any.
        bare: no space in front of a text.
        """
        bare = bare and bool(self._bare_parts)
        if (marked, bare) not in self._variants:
            content = json.loads(self.files["tokenizer.json"])
            content["post_processor"] = None  # it names special tokens, and none are asked of it
            if bare:
                content |= self._bare_parts
            if marked:
                backend = self._renamed(content)
            else:
                backend = _build(json.dumps(content))
            self._variants[marked, bare] = backend
        return self._variants[marked, bare]

    def _renamed(self, content: dict) -> tokenizers.Tokenizer:
        """The tokenizer of tokenizer.json's content, `MARK` in front of its control tokens."""
        renamed = {name: MARK + name for name in self.control_names}
        model = content["model"]
        for token in content.get("added_tokens", []):
            token["content"] = renamed.get(token["content"], token["content"])
        vocab = model.get("vocab")
        if isinstance(vocab, dict):
            model["vocab"] = {renamed.get(token, token): i for token, i in vocab.items()}
        elif isinstance(vocab, list):
            model["vocab"] = [[renamed.get(token, token), score] for token, score in vocab]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        try:
            backend = _build(json.dumps(content))
        except Exception as e:  # as above
            raise UserError(
                f"{self.source}: a special token is part of other tokens ({reason(e)})"
            ) from None
        for name, other in renamed.items():
            if self.backend.token_to_id(name) not in backend.encode(f".{other}.").ids:
                raise UserError(
                    f"{self.source}: {name} cannot be told apart from text that looks like it"
                )
        return backend

    # --- the chat template -----------------------------------------------------------------------

    @cached_property
    def _templates(self) -> ChatTemplates:
        found = self.settings.get("chat_template") or []
        if "chat_template.jinja" in self.files:
            found = self.files["chat_template.jinja"].decode()
        if isinstance(found, str):
            found = {"name": "default", "template": found}
        if not isinstance(found, list):
            found = [found]
        sources = {}
        for template in found:
            parts = Fields(template, f"{self.source}: a chat_template of tokenizer_config.json")
            sources[parts.get("name", str)] = parts.get("template", str)
        return ChatTemplates(sources, self.source)

    @property
    def chat_template(self) -> str | None:
        """The template's source, or None."""
        return self._templates.sources.get("default")

    @property
    def template_arguments(self) -> frozenset[str]:
        """The names that the chat templates read and do not set themselves."""
        return self._templates.arguments

    def render(
        self,
        messages: Sequence[dict],
        generate: bool = False,
        tools: list[dict] | None = None,
        template_kwargs: Json | None = None,
    ) -> str:
        """Write messages as the template's text.

        The template gets what `transformers` gives it: `tools` and `documents` (None where there
        are none), the named special tokens, and `template_kwargs` (`enable_thinking`, ...).

        generate: end where the assistant is to begin. Raises UserError.
        """
        variables = self._named_tokens | (template_kwargs or {})
        return self._templates.render(messages, generate, tools, variables)

    def render_many(self, wanted: Iterable[dict[str, Any]]) -> list[str | None]:
        """What `render` makes of each of these arguments, None where it is to be asked itself."""
        named = self._named_tokens
        questions = []
        for given in wanted:
            rest = dict(given)
            rest["variables"] = named | rest.pop("template_kwargs")
            questions.append(rest)
        return self._templates.render_many(questions)

    @cached_property
    def _named_tokens(self) -> dict[str, str]:
        """Special tokens that tokenizer_config.json names, as chat templates get them."""
        found = {}
        for kind in SPECIAL:
            token = self.settings.get(f"{kind}_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str) and token:
                found[f"{kind}_token"] = token
        return found

    @cached_property
    def eos(self) -> str:
        """The end-of-text token."""
        token = self._named_tokens.get("eos_token")
        if token is None or self.backend.token_to_id(token) is None:
            raise UserError(
                f"{self.source}: tokenizer_config.json names no eos_token that the tokenizer knows"
            )
        return token

    @cached_property
    def turn_end(self) -> str:
        """The token with which the chat template ends an assistant's turn.

        `<|im_end|>` for Qwen, base models too.
        """
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
        rendered = self.render(messages).replace(ESCAPE, "")
        ids = self.encode(rendered.rpartition(PROBE)[2].lstrip())
        is_added = bool(ids) and ids[0] in [token["id"] for token in self._added]
        return self.id_to_token[ids[0]] if is_added else self.eos

    def stop_ids(self) -> list[int]:
        """Ids that end a generation: the turn's end, then end-of-text (Qwen: 151645, 151643)."""
        names = [self.turn_end if self.chat_template else self.eos, self.eos, "<|endoftext|>"]
        ids = [self.backend.token_to_id(name) for name in names]
        return list(dict.fromkeys(i for i in ids if i is not None))


def _check_merges(model: Json) -> None:
    """Raise ValueError where the tokenizers library would panic, with pages on standard error."""
    prefix = model.get("continuing_subword_prefix")
    if not prefix:
        return
    for merge in model.get("merges") or ():
        second = merge.split()[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"a merge whose second part does not begin with {prefix!r}")


def _growth(part: Any) -> float:
    """How many times as long the steps in a part of tokenizer.json can make a text, about.

    A row of steps that double it would fill the memory, in code that hears no signal.
    """
    growth = 1.0
    if isinstance(part, dict):
        content, pattern = part.get("content"), part.get("pattern")
        if part.get("type") == "ByteLevel":
            growth = 2.0
        elif part.get("type") == "Replace" and content:
            old = isinstance(pattern, dict) and pattern.get("String")
            growth = max(1.0, len(content) / len(old)) if old else 1.0 + len(content)
        elif part.get("type") == "TemplateProcessing":
            growth = max(1.0, sum("Sequence" in piece for piece in part["single"]))
        part = [*part.values()]
    for inner in part if isinstance(part, list) else ():
        growth *= _growth(inner)
    return growth


def _build(text: str) -> tokenizers.Tokenizer:
    """A tokenizer.json's tokenizer, which neither pads nor cuts off."""
    backend = tokenizers.Tokenizer.from_str(text)
    backend.no_padding()
    backend.no_truncation()
    return backend


def _without_prefix(part: Any) -> Any:
    """A part of tokenizer.json without the steps that put a space in front, or take it away."""
    if isinstance(part, list):
        return [_without_prefix(step) for step in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    result = {name: _without_prefix(value) for name, value in part.items()}
    plain = {"add_prefix_space": False, "prepend_scheme": "never", "start": 0}
    return result | {name: value for name, value in plain.items() if name in part}


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tiny(texts: Iterable[str], vocab_size: int = 512) -> Tokenizer:
    """Train a small tokenizer of Qwen2.5's kind, with a chat template of its form.

    That is NFC, Qwen's pre-tokenizer and byte-level BPE. `transformers` loads it as a
    Qwen2Tokenizer, which brings that pre-tokenizer whatever tokenizer.json says.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    settings = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHATML,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings, indent=1).encode(),
    }
    return Tokenizer(files, "the embedded tokenizer")
