"""Any `tokenizer.json`, the checkpoint's own chat template, and the vocabulary that two models share."""

import json
from functools import cached_property
from pathlib import Path

import tokenizers

from errors import UserError
from files import named, read_text

FILES = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_PROBE = "srlm-probe"


class Tokenizer:
    """Text <-> ids. `files` (name -> bytes) are written beside every checkpoint, unchanged."""

    def __init__(self, files, where):
        self.files, self.where = files, str(where)
        try:
            self.json = json.loads(files["tokenizer.json"])
            self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
            self.settings = json.loads(files.get("tokenizer_config.json", b"{}"))
        except KeyError:
            raise UserError(f"{where} has no tokenizer.json; name a folder that has one with --tokenizer") from None
        except Exception as e:  # the tokenizers library raises bare Exceptions
            raise UserError(f"{where}: the tokenizer files are damaged ({_first_line(e)})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    @classmethod
    def load(cls, folder):
        folder = Path(folder)
        files = {}
        for name in FILES:
            path = folder / name
            if named(path) and (not path.exists() or path.stat().st_size or name == "tokenizer.json"):
                files[name] = read_text(path).encode()  # without a byte order mark, which the tokenizers library does not know
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

    def encode(self, text):
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts):
        return [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids, skip_special=False):
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def chat_template(self):
        """The template's source, or None."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].decode()
        template = self.settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        return template

    @cached_property
    def _compiled_template(self):
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if self.chat_template is None:
            raise UserError(f"{self.where} has no chat template; use --template plain")

        def raise_exception(message):
            raise TemplateError(message)

        env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        env.filters["tojson"] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
        env.globals["raise_exception"] = raise_exception
        return env.from_string(self.chat_template)

    def render(self, messages, generate=False):
        """Messages as the template's text; generate=True ends where the assistant is to begin."""
        from jinja2 import TemplateError

        special = {k: _token(self.settings.get(k)) for k in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            return self._compiled_template.render(
                messages=list(messages), add_generation_prompt=generate, **{k: v for k, v in special.items() if v}
            )
        except TemplateError as e:
            raise UserError(f"{self.where}: the chat template refuses these messages ({_first_line(e)})") from None

    @cached_property
    def eos(self):
        """The end-of-text token (text)."""
        token = _token(self.settings.get("eos_token"))
        if token is None or self._tokenizer.token_to_id(token) is None:
            raise UserError(f"{self.where}: tokenizer_config.json names no eos_token that the tokenizer knows")
        return token

    @cached_property
    def turn_end(self):
        """The token (text) with which the chat template ends an assistant's turn: `<|im_end|>` for Qwen, base models too."""
        text = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": _PROBE}])
        ids = self.encode(text.rpartition(_PROBE)[2].lstrip())
        special = {t["id"] for t in self.json.get("added_tokens", [])}
        return self.id_to_token[ids[0]] if ids and ids[0] in special else self.eos

    def stop_ids(self):
        """Ids that end a generation: the turn's end first, then end-of-text (Qwen: 151645, 151643)."""
        names = [self.turn_end if self.chat_template else self.eos, self.eos, "<|endoftext|>"]
        ids = [self._tokenizer.token_to_id(name) for name in names]
        return list(dict.fromkeys(i for i in ids if i is not None))


def shared_vocabulary(a, b):
    """How many ids two tokenizers share: the longest common id -> token prefix. UserError if they cut text differently.

    Logits of the two models are compared over this prefix, sliced before the softmax; rows beyond it are padding.
    """
    for part, name in (("normalizer", "normaliser"), ("pre_tokenizer", "pre-tokenizer")):
        if a.json.get(part) != b.json.get(part):
            raise UserError(f"{a.where} and {b.where} have different tokenizers ({name}); a teacher must share the student's")
    if _merges(a) != _merges(b):
        raise UserError(f"{a.where} and {b.where} have different tokenizers (merges); a teacher must share the student's")
    shared = 0
    while shared in a.id_to_token and a.id_to_token[shared] == b.id_to_token.get(shared):
        shared += 1
    if not shared:
        raise UserError(f"{a.where} and {b.where} share no token ids; a teacher must share the student's tokenizer")
    return shared


QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tiny(texts, vocab_size=512):
    """A small tokenizer of Qwen2.5's kind (NFC, its pre-tokenizer, byte-level BPE) with a chat template of its form.

    `transformers` loads it as a Qwen2Tokenizer, which brings that pre-tokenizer whatever tokenizer.json says.
    """
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": template}
    settings["tokenizer_class"] = "Qwen2Tokenizer"
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings, indent=1).encode()}
    return Tokenizer(files, "the embedded tokenizer")


def _merges(tokenizer):
    merges = tokenizer.json.get("model", {}).get("merges") or []
    return [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]


def _token(value):
    return value.get("content") if isinstance(value, dict) else value


def _first_line(error):
    return (str(error) or type(error).__name__).splitlines()[0]
