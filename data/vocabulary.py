"""The vocabulary that two tokenizers share."""

import itertools
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from errors import UserError

if TYPE_CHECKING:
    from data.tokenizer import Tokenizer

# Texts on which tokenizers that cut differently differ: digits, contractions, case, accents
# composed and not, scripts, white space, line ends, punctuation, emoji, controls.
PROBES = (
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
)


def shared_vocabulary(a: "Tokenizer", b: "Tokenizer") -> int:
    """How many ids two tokenizers share: the length of the longest common id -> token prefix.

    Logits of the two models are compared over this prefix, sliced before the softmax; rows beyond
    it are padding. What decides ids is compared, not the files: a tokenizer that was loaded and
    saved by another version of a library has other defaults written out in it.

    Raises UserError if they cut text differently.
    """
    parts_a, parts_b = _deciding_parts(a), _deciding_parts(b)
    differing = [name for name in parts_a if parts_a[name] != parts_b[name]]
    if differing and (differing[0] == "merges" or not _cut_alike(a, b)):
        raise UserError(
            f"{a.source} and {b.source} have different tokenizers ({differing[0]}); "
            "a teacher must share the student's"
        )
    shared = 0
    while shared in a.id_to_token and a.id_to_token[shared] == b.id_to_token.get(shared):
        shared += 1
    if not shared:
        raise UserError(
            f"{a.source} and {b.source} share no token ids; "
            "a teacher must share the student's tokenizer"
        )
    return shared


def _deciding_parts(tokenizer: "Tokenizer") -> dict[str, object]:
    """What of a tokenizer decides how a text is cut.

    In the form in which the library writes it out: older spellings and missing defaults become
    today's.
    """
    content = json.loads(tokenizer.backend.to_str())
    model = content["model"]
    del model["vocab"]
    return {
        "merges": model.pop("merges", None),
        "normalizer": content["normalizer"],
        "pre-tokenizer": content["pre_tokenizer"],
        "model": model,
    }


def _cut_alike(a: "Tokenizer", b: "Tokenizer") -> bool:
    """Whether two tokenizers whose files differ cut text alike.

    By the same patterns, on awkward texts alone and joined, and on words of the vocabulary in a
    mixed order.
    """
    if sorted(_patterns(a.json)) != sorted(_patterns(b.json)):
        return False
    texts = [*PROBES, "".join(PROBES)]
    texts += [first + second for first, second in itertools.pairwise(PROBES)]
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
