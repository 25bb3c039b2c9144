"""A real checkpoint beside `transformers`: SRLM_CHECKPOINT names its folder.

Any checkpoint of a supported family serves; figures in LOG.md are those of Gemma 3 270M.
"""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from data.tokenizer import Tokenizer
from kernels.attention import PackedAttention
from model.checkpoint import build_model, read_config
from model.generate import generate

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint():
    if not os.environ.get("SRLM_CHECKPOINT"):
        pytest.skip("SRLM_CHECKPOINT is not set: it names the folder of a real checkpoint")
    return Path(os.environ["SRLM_CHECKPOINT"])


@pytest.fixture(scope="module")
def models(checkpoint):
    ours = build_model(read_config("", checkpoint), checkpoint, device="cpu", seed=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return ours.eval().requires_grad_(False), theirs.eval()


@pytest.fixture(scope="module")
def questions(checkpoint):
    folder = os.environ.get("SRLM_DATA")
    if not folder or not Path(folder, "gsm8k/test.jsonl").is_file():
        pytest.skip("SRLM_DATA has no gsm8k/test.jsonl")
    lines = Path(folder, "gsm8k/test.jsonl").read_text().splitlines()
    return [json.loads(line)["question"] for line in lines[:20]]


@torch.no_grad()
def test_logits_beyond_the_window(checkpoint, models, questions):
    """All 20 questions as one document of more tokens than a window has, and one question."""
    ours, theirs = models
    tokenizer = Tokenizer.load(checkpoint)
    for text in ("\n\n".join(questions), questions[0]):
        tokens = torch.tensor(tokenizer.encode(text))
        hidden_TD = ours(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))
        rows = slice(max(0, len(tokens) - 64), None)
        got = hidden_TD[rows] @ ours.head_VD.T
        want = theirs(tokens[None], logits_to_keep=64).logits[0]
        difference = (got - want).abs().max()
        print(f"{len(tokens)} tokens: logits differ by at most {difference:.1e}")
        assert difference < 2e-3 and (got - want).norm() < 2e-5 * want.norm()


@torch.no_grad()
def test_100_greedy_tokens_on_20_questions(checkpoint, models, questions):
    """A text is the other library's greedy one if each of its tokens is that model's first choice
    after those before it."""
    ours, theirs = models
    tokenizer = Tokenizer.load(checkpoint)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts = [f"Question: {question}\nAnswer:" for question in questions]
    prompts = [tokenizer.opening_ids + tokenizer.encode(text) for text in texts]
    assert prompts == [their_tokenizer(text)["input_ids"] for text in texts]
    clock = time.perf_counter()
    completions = generate(ours, prompts, 100, [])
    print(f"20 x 100 tokens in {time.perf_counter() - clock:.1f} s")
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = torch.tensor([prompt + completion.tokens])
        logits = theirs(tokens, logits_to_keep=101).logits[0, :-1]
        assert logits.argmax(-1).tolist() == completion.tokens
