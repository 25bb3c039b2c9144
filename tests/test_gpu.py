"""What only a GPU can show: kernels where the loop and the engine use them, and CUDA graphs.

On a small body with the heads of the 0.5B.
"""

import functools
import json

import numpy as np
import pytest
import torch

from data.batch import Document, GlobalBatch
from kernels import backend
from kernels.attention import PackedAttention
from kernels.decode_attention import decode_attention, decode_reference, rotate_and_store
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob
from kernels.linear_topk import linear_topk_divergence, topk_logprobs
from losses.kd import DIVERGENCES, KDConfig, kd_loss
from losses.sft import cross_entropy, sft_loss
from model import generate as engine
from model import kv_cache
from model.checkpoint import build_model, save_model
from model.generate import generate
from model.sampling import Sampler
from model.transformer import ModelConfig, embed, rope_tables, rotate
from tests.test_generate import some_prompts
from toy_models import toy_tokenizer
from train import forward_backward, main

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = dict(
    vocab_size=2000,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)


@pytest.fixture(autouse=True)
def by_the_device():
    yield
    backend.use("auto")


def body(seed=0, dtype=torch.bfloat16, **more):
    return build_model(
        ModelConfig(**SHAPE | more), None, device="cuda", seed=seed, compute_dtype=dtype
    )


def batch():
    rng = np.random.default_rng(0)
    return GlobalBatch(
        [
            Document(rng.integers(1900, size=n), (np.arange(n) > n // 4).astype(float))
            for n in (1, 5, 127, 128, 129, 400)
        ]
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("loss", ["sft", "kd", "topk"])
def test_a_step_by_kernels_is_the_step_without(loss, checkpointing):
    teacher = body(1, hidden_size=384, num_heads=6).requires_grad_(False) if loss != "sft" else None
    cfg = KDConfig(
        divergence="jsd",
        beta=0.3,
        temperature=2.0,
        t_squared=True,
        ce=0.2,
        vocab=1990,
        signal="topk" if loss == "topk" else "full",
        k=20,
    )
    kd = functools.partial(kd_loss, cfg=cfg)
    gradients = {}
    for kernels, dtype in (("triton", torch.bfloat16), ("torch", torch.float32)):
        backend.use(kernels)
        model = body(dtype=dtype)
        model.activation_checkpointing = checkpointing
        if teacher:
            teacher.compute_dtype = dtype
            teacher.to(dtype)
        micro = batch()
        sums = forward_backward(
            model,
            [teacher] if teacher else [],
            kd if teacher else sft_loss,
            micro,
            micro.normalizer,
            1024,
            torch.device("cuda"),
        )
        gradients[kernels] = (
            float(sums["loss"][0]),
            torch.cat([p.grad.flatten() for p in model.parameters()]).double(),
        )
    (loss_a, a), (loss_b, b) = gradients["triton"], gradients["torch"]
    assert abs(loss_a - loss_b) < 0.02 * abs(loss_b)
    assert (a - b).norm() < 0.05 * b.norm()  # bf16 bodies against fp32 ones


@pytest.mark.parametrize(
    "filters",
    [dict(temperature=0.0), dict(temperature=0.9), dict(temperature=1.2, top_k=50, top_p=0.9)],
    ids=str,
)
def test_recorded_steps_write_what_unrecorded_ones_do(filters, monkeypatch):
    """Rows that end, move and are refilled; a cache that has to move.

    The batches are composed alike, so the bits are the same.
    """
    model, prompts = body(), some_prompts([n % 40 + 1 for n in range(90)], 1900)
    options = dict(vocab=1990, seeds=range(90), batch_size=33) | filters
    results = {}
    for name, after, free in (("recorded", 2, None), ("moving", 2, 0), ("unrecorded", 10**9, None)):
        monkeypatch.setattr(engine, "CAPTURE_AFTER", after)
        if free is not None:  # as if the whole cache did not fit
            monkeypatch.setattr(kv_cache, "free_bytes", lambda device: 0)
        results[name] = [
            (c.tokens, c.logp) for c in generate(model, prompts, 70, range(60), **options)
        ]
        monkeypatch.undo()
    assert results["recorded"] == results["unrecorded"] == results["moving"]
    assert len({len(tokens) for tokens, _ in results["recorded"]}) > 5


def test_scores_of_what_was_sampled_agree_with_the_sampler():
    model, prompts = body(), some_prompts([5, 60, 200], 1900)
    options = dict(vocab=1990, temperature=1.0, seeds=range(3))
    completions = generate(model, prompts, 50, [], **options)
    for prompt, c in zip(prompts, completions, strict=True):
        tokens = torch.tensor(prompt + c.tokens, device="cuda")
        hidden = model(
            tokens, torch.arange(len(tokens), device="cuda"), PackedAttention([len(tokens)], "cuda")
        )[len(prompt) - 1 : -1]
        logp = (
            (hidden.float() @ model.head_VD[:1990].float().T)
            .log_softmax(1)
            .gather(1, tokens[len(prompt) :, None])
            .squeeze(1)
        )
        assert (logp - torch.tensor(c.logp, device="cuda")).abs().max() < 0.1


def exact_attention(qkv, lengths, window):
    """From the definition, in the tensors' own precision: a document at a time."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in qkv), strict=True):
        group = q.shape[1] // k.shape[1]
        score = torch.einsum("ihe,jhe->hij", q, k.repeat_interleave(group, 1)) / q.shape[2] ** 0.5
        apart = torch.arange(len(q), device="cuda")
        apart = apart[:, None] - apart[None, :]  # keys behind the query
        score = score.masked_fill((apart < 0) | (apart >= (window or len(q))), -torch.inf)
        outputs.append(
            torch.einsum("hij,jhe->ihe", score.softmax(2), v.repeat_interleave(group, 1))
        )
    return torch.cat(outputs)


def relative_error(got, want):
    return (got.double() - want.double()).norm() / want.double().norm()


@pytest.mark.parametrize("size,window", [(64, 100), (128, 70), (128, 257), (256, 0), (256, 200)])
def test_attention_with_windows_and_wide_heads(size, window):
    from kernels.triton_attention import attention, tile_map

    lengths = [0, 1, 127, 129, 700, 64]
    generator = torch.Generator("cuda").manual_seed(0)
    qkv, upstream = [], torch.randn(sum(lengths), 4, size, device="cuda", generator=generator)
    for heads in (4, 2, 2):
        x = torch.randn(sum(lengths), heads, size, device="cuda", generator=generator)
        qkv.append(x.bfloat16().requires_grad_())

    def run(window):
        o, _ = attention(*qkv, tile_map(lengths).cuda(), window)
        return o, *torch.autograd.grad(o, qkv, upstream.bfloat16())

    leaves = [x.detach().double().requires_grad_() for x in qkv]
    o = exact_attention(leaves, lengths, window)
    want = o, *torch.autograd.grad(o, leaves, upstream.bfloat16().double())
    for got, exactly in zip(run(window), want, strict=True):
        assert relative_error(got, exactly) < 5e-3  # twice what bf16 rounds away
    for a, b in zip(run(0), run(700), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size,window", [(128, 0), (128, 300), (256, 0), (256, 64)])
def test_decode_with_windows_and_wide_heads(size, window):
    length_B = torch.tensor([0, 1, 256, 513, 1000], device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(5, 1, 4, size, device="cuda", generator=generator).bfloat16()
    k, v = torch.randn(2, 5, 1, 1024, size, device="cuda", generator=generator).bfloat16()
    got = decode_attention(q, k, v, length_B, window)
    want = decode_reference(q.double(), k.double(), v.double(), length_B, window)
    assert relative_error(got, want) < 5e-3 and not got[0].any()
    assert torch.equal(
        decode_attention(q, k, v, length_B), decode_attention(q, k, v, length_B, 1000)
    )


def test_counters_join_the_splits_the_same_way_every_time(device="cuda"):
    """Which program comes last changes from call to call; the bits do not."""
    length_B = torch.randint(1, 4096, (64,), device=device)
    generator = torch.Generator(device).manual_seed(0)
    q = torch.randn(64, 1, 14, 64, device=device, generator=generator).bfloat16()
    k, v = torch.randn(2, 64, 2, 4096, 64, device=device, generator=generator).bfloat16()
    arrived = torch.zeros(64 * 14, dtype=torch.int32, device=device)
    want = decode_attention(q, k, v, length_B, 0, arrived)
    exact = decode_reference(q.double(), k.double(), v.double(), length_B)
    assert relative_error(want, exact) < 5e-3
    for _ in range(200):
        assert torch.equal(decode_attention(q, k, v, length_B, 0, arrived), want)
    assert not arrived.any()


def test_rotation_and_store_are_those_of_the_model(device="cuda"):
    g = torch.Generator(device).manual_seed(0)
    joint = torch.randn(70, 18 * 64, device=device, generator=g).bfloat16()
    q, k, v = (x.unflatten(1, (-1, 64)) for x in joint.split([14 * 64, 2 * 64, 2 * 64], 1))
    slot_B = torch.randint(100, (70,), device=device)
    rope = rope_tables(slot_B, 64, 1e6, torch.bfloat16)
    kv = torch.zeros(2, 80, 2, 100, 64, device=device, dtype=torch.bfloat16)
    rotated = rotate_and_store(q, k, v, rope, kv, slot_B)
    rows = torch.arange(70, device=device)
    wide = [x.float() for x in rope]
    assert relative_error(rotated, rotate(q.float(), wide)) < 3e-3
    assert relative_error(kv[0, rows, :, slot_B], rotate(k.float(), wide)) < 3e-3
    assert torch.equal(kv[1, rows, :, slot_B], v) and kv[1].count_nonzero() <= v.numel()


def rows_to_draw(device):
    """Hidden rows, a head with an id too many, and a random number a row."""
    g = torch.Generator(device).manual_seed(0)
    hidden, head = (
        torch.randn(n, 896, device=device, generator=g).bfloat16() for n in (200, 20_001)
    )
    head = head / 10
    u = torch.rand(200, device=device, generator=g, dtype=torch.float64)
    return hidden, head, u


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_draws_without_stored_logits(temperature, device="cuda"):
    """Ids and log-probs beside fp64: the random number lies between the borders of its id."""
    hidden, head, u = rows_to_draw(device)
    sampler = Sampler(head, 20_000, 200, temperature)
    ids, logp = sampler(hidden, u)
    logits = hidden.double() @ head[:20_000].double().T / (temperature or 1.0)
    exact = logits.log_softmax(1)
    want = exact.gather(1, ids[:, None])[:, 0]
    assert sampler.by_kernel and (logp - want).abs().max() < 1e-4
    if temperature:
        above = exact.exp().cumsum(1).gather(1, ids[:, None])[:, 0]
        assert (u < above + 1e-5).all() and (u > above - want.exp() - 1e-5).all()
    else:
        assert (exact.amax(1) - want).max() < 1e-4


@pytest.mark.parametrize("filters", [(0.6, 0, 0.95), (1.0, 50, 1.0), (3.0, 5000, 0.9)], ids=str)
def test_draws_of_what_top_k_and_top_p_keep(filters, device="cuda"):
    """The ids of the sampler in PyTorch, but for a random number or two at a border."""
    hidden, head, u = rows_to_draw(device)
    sampler = Sampler(head, 20_000, 200, *filters)
    ids, logp = sampler(hidden, u)
    assert sampler.by_kernel and all(torch.equal(ids, sampler(hidden, u)[0]) for _ in range(20))
    backend.use("torch")
    want_ids, want_logp = Sampler(head, 20_000, 200, *filters)(hidden, u)
    same = ids == want_ids
    assert (~same).sum() <= 2 and (logp - want_logp)[same].abs().max() < 1e-4


def test_the_gradient_of_a_tied_embedding_goes_into_the_heads(device="cuda"):
    """The same bits each time, whatever ids repeat."""
    tokens_T = torch.randint(50, (4000,), device=device)
    upstream = torch.randn(4000, 256, device=device)
    head = torch.randn(2, 1000, 256, device=device)
    weight, results = head[0].clone().requires_grad_(), []
    for _ in range(5):
        weight.grad = head[1].clone()
        buffer = weight.grad.data_ptr()
        (embed(tokens_T, weight, tied=True) * upstream).sum().backward()
        assert weight.grad.data_ptr() == buffer
        results.append(weight.grad)
    want = head[1].double().index_add(0, tokens_T, upstream.double())
    assert relative_error(results[0], want) < 1e-5
    assert all(torch.equal(x, results[0]) for x in results)


# --- what neither of the above reaches ----------------------------------------------------


@pytest.mark.parametrize("kernels", ["triton", "torch"])
@pytest.mark.parametrize("loss", ["logprob", "kl", "topk"])
def test_several_chunks_are_one(loss, kernels, device="cuda"):
    """The gradient of the head is added up over chunks, in fp32, beside bf16 operands."""
    backend.use(kernels)
    generator = torch.Generator(device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=device)
    weight_N, results = random(1000).abs(), {}
    hidden_ND, teacher_ND = random(2, 1000, 256).bfloat16()
    heads = random(2, 2001, 256) / 16
    target_N = torch.randint(2000, (1000,), generator=generator, device=device)
    ids_Nk, logp_NB = topk_logprobs(teacher_ND, heads[1], 20, vocab=2000)
    for chunk_rows in (256, 1000):
        hidden, head = hidden_ND.detach().requires_grad_(), heads[0].detach().requires_grad_()
        options = dict(vocab=2000, chunk_rows=chunk_rows)
        if loss == "logprob":
            total, _ = linear_logprob(hidden, head, target_N, weight_N, cross_entropy, **options)
        elif loss == "kl":
            teacher = teacher_ND, heads[1]
            total, _ = linear_kl(hidden, head, *teacher, weight_N, "forward_kl", **options)
        else:
            kl = functools.partial(DIVERGENCES["forward_kl"], beta=0.5)
            total, _ = linear_topk_divergence(
                hidden, head, ids_Nk, logp_NB, weight_N, kl, **options
            )
        total.backward()
        results[chunk_rows] = total.detach(), hidden.grad, head.grad
    for some, whole in zip(*results.values(), strict=True):
        assert relative_error(some, whole) < 4e-3  # bf16 gradients of logits


def test_logits_beyond_two_to_the_31(device="cuda", rows=16384, vocab=151936):
    """Rows of a chunk of 2.5e9 logits, and several tiles of rows, beside the same rows alone."""
    generator = torch.Generator(device).manual_seed(0)
    hidden_ND = torch.randn(rows, 64, generator=generator, device=device).bfloat16()
    head_VD = torch.randn(vocab, 64, generator=generator, device=device) / 8
    target_N = torch.randint(vocab, (rows,), generator=generator, device=device)
    weight_N = torch.ones(rows, device=device)
    last, results = slice(rows - 64, rows), []
    for part, chunk_rows in ((slice(0, rows), rows), (last, 64)):
        hidden = hidden_ND[part].detach().requires_grad_()
        total, values = linear_logprob(
            hidden, head_VD, target_N[part], weight_N[part], cross_entropy, chunk_rows=chunk_rows
        )
        total.backward()
        results.append((values["logp"][-64:], hidden.grad[-64:]))
    for some, alone in zip(*results, strict=True):
        assert relative_error(some, alone) < 4e-3


@pytest.mark.parametrize("lora_rank", ["0", "4"])
def test_a_compiled_grpo_run_is_the_uncompiled_one(lora_rank, tmp_path, device="cuda"):
    """Rollouts, two updates on each, checkpointing and a compiled body, by the command."""
    tokenizer = toy_tokenizer()
    config = ModelConfig(**SHAPE | dict(vocab_size=512))
    model = build_model(config, None, device="cpu", seed=0)
    (tmp_path / "model").mkdir()
    save_model(model, tmp_path / "model", tokenizer, tokenizer.stop_ids())
    runs = {}
    for compiled in ("true", "false"):
        command = dict(
            mode="grpo",
            model=tmp_path / "model",
            data="word_problems:64",
            runs=tmp_path,
            name=f"compiled-{compiled}",
            device=device,
            compile=compiled,
            lora_rank=lora_rank,
            steps=4,
            batch_size=32,
            grpo_minibatches_per_rollout=2,
            grpo_reward="format",
            grpo_entropy_coef=0.01,  # a gradient whatever is earned
            sample_tokens=24,
            activation_checkpointing=compiled,
            eval_examples=0,
        )
        assert main([f"--{name}={value}" for name, value in command.items()]) == 0
        lines = (tmp_path / f"compiled-{compiled}/metrics.jsonl").read_text().splitlines()
        runs[compiled] = [json.loads(line) for line in lines if "train/entropy" in line]
    for compiled, eager in zip(runs["true"], runs["false"], strict=True):
        assert compiled["train/sampler_mismatch"] < 0.05
        assert abs(compiled["train/entropy"] - eager["train/entropy"]) < 0.05
    assert runs["true"][-1]["train/no_gradient"] == 0
