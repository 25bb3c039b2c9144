"""Small tokenizers built as those of well-known families are, with templates of their kinds."""

import functools
import json

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

import data.tokenizer
from data.tokenizer import CHATML, QWEN_SPLIT
from tests.chat_templates import REASONING

TEXTS = [
    "Mia has 12 apples and buys 3 more. How many apples does she have now?",
    "def f(x):\n    return x + 1\n\nThe answer is \\boxed{15}.\n#### 15",
    "To be, or not to be: that is the question; whether 'tis nobler in the mind.",
] * 4

# Llama 3's kind: the template writes BOS itself, though the post-processor adds it as well.
LLAMA3 = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Llama 2's kind: BOS and EOS around every pair of turns.
LLAMA2 = """{%- for m in messages %}{%- if m.role == 'user' %}
{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}
{%- else %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}"""

# TinyLlama's kind: no BOS, text behind EOS.
ZEPHYR = """{% for m in messages %}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

# Gemma's kind: the assistant is called model.
GEMMA = """{{- bos_token }}{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- m.content | trim + '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""


def _finish(backend: Tokenizer, template: str, **named: str) -> data.tokenizer.Tokenizer:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **named}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
    }
    return data.tokenizer.Tokenizer(files, "the checkpoint")


def _byte_level(special: list[str], pieces: list) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*pieces, level])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=450, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def _bos(backend: Tokenizer, bos: str) -> processors.TemplateProcessing:
    pair = f"{bos} $A {bos}:1 $B:1"
    tokens = [(bos, backend.token_to_id(bos))]
    return processors.TemplateProcessing(single=f"{bos} $A", pair=pair, special_tokens=tokens)


def _byte_fallback(special: list[str]) -> Tokenizer:
    """SentencePiece's BPE as a tokenizer.json has it: 256 byte tokens, words that begin with ▁."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(
        Regex("▁|\n|(?<=[a-z])(?=[^a-z])"), "merged_with_next"
    )
    trained.train_from_iterator(
        [text.replace("\n", "") for text in TEXTS],
        trainers.BpeTrainer(vocab_size=300, show_progress=False),
    )
    model = json.loads(trained.to_str())["model"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    vocab = {word: i for i, word in enumerate(words)}
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return backend


def llama3() -> data.tokenizer.Tokenizer:
    bos, eos = "<|begin_of_text|>", "<|eot_id|>"
    special = [bos, "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", eos]
    backend = _byte_level(special, [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")])
    level = processors.ByteLevel(trim_offsets=False)
    backend.post_processor = processors.Sequence([level, _bos(backend, bos)])
    return _finish(backend, LLAMA3, bos_token=bos, eos_token=eos, pad_token=eos)


def smollm2() -> data.tokenizer.Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>"]
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = _byte_level(special, [digits, pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")])
    bos, eos = "<|im_start|>", "<|im_end|>"
    return _finish(backend, CHATML, bos_token=bos, eos_token=eos, pad_token=eos)


def qwen3() -> data.tokenizer.Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = _byte_level(special, [pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")])
    backend.normalizer = normalizers.NFC()
    backend.add_tokens(["<think>", "</think>"])
    return _finish(backend, REASONING, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama2(template: str = LLAMA2, scheme: str = "normalizer") -> data.tokenizer.Tokenizer:
    """scheme: where the ▁ in front comes from: a normalizer, or Metaspace "first" or "always"."""
    backend = _byte_fallback(["<unk>", "<s>", "</s>"])
    if scheme == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        backend.normalizer = normalizers.Sequence(steps)
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.post_processor = _bos(backend, "<s>")
    return _finish(backend, template, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def gemma() -> data.tokenizer.Tokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    backend = _byte_fallback(special)
    backend.add_tokens([AddedToken("\n\n", normalized=False)])
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = _bos(backend, "<bos>")
    return _finish(backend, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


FAMILIES = {
    "llama3": llama3,
    "smollm2": smollm2,
    "qwen3": qwen3,
    "llama2": llama2,
    "llama2_first": functools.partial(llama2, scheme="first"),
    "llama2_always": functools.partial(llama2, scheme="always"),
    "zephyr": functools.partial(llama2, ZEPHYR),
    "zephyr_first": functools.partial(llama2, ZEPHYR, "first"),
    "gemma": gemma,
}
