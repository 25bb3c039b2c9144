"""A CPU's products, its softmax, and the gradient of a tied embedding, beside plain torch."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bench.train_step import random_batch
from kernels import attention, chunk, cpu
from kernels.chunk import CHUNK_ELEMENTS, default_chunk_rows, product, softmax
from kernels.linear_kl import linear_kl
from kernels.linear_logprob import linear_logprob
from kernels.linear_topk import topk_logprobs
from losses.sft import sft_loss
from model.checkpoint import build_model
from model.generate import generate
from model.optim import build_optimizer
from model.presets import PRESETS
from model.transformer import embed
from train import forward_backward


class Libraries(TorchDispatchMode):
    """Which settings of the library each operation has met."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        setting = torch.backends.mkldnn.matmul.fp32_precision
        self.seen.setdefault(op.name(), set()).add(setting)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def fresh_choice():
    """The choice is made anew in the test, and again after it."""
    cpu.onednn_is_exact.cache_clear()
    yield
    cpu.onednn_is_exact.cache_clear()


@pytest.mark.parametrize("rows, width, depth", [(1, 9000, 64), (16, 9001, 256), (300, 4099, 896)])
def test_products_are_exact_in_whatever_library(rows, width, depth):
    a, b = torch.randn(rows, depth), torch.randn(width, depth)
    exact = a.double() @ b.double().t()
    got = product(a, b.t(), torch.empty(rows, width))
    assert (got - exact).abs().max() < 2e-6 * exact.abs().max()
    added = product(a, b.t(), exact.float(), add=True)
    assert (added - 2 * exact).abs().max() < 2e-6 * exact.abs().max()


def test_the_setting_is_restored():
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    with pytest.raises(RuntimeError), cpu.fastest_product(torch.empty(1), cpu.LEAST_PRODUCT):
        assert (settings.fp32_precision == "bf16") == cpu.onednn_is_exact()
        torch.mm(torch.ones(2, 3), torch.ones(2, 3))
    assert settings.fp32_precision == before
    with cpu.fastest_product(torch.empty(1, dtype=torch.float64), cpu.LEAST_PRODUCT):
        assert settings.fp32_precision == before


def test_fused_attention_is_computed_by_the_default_library(monkeypatch):
    """It is made of small products. Everything around it, backward too, has what was chosen."""
    settings = torch.backends.mkldnn.matmul
    monkeypatch.setattr(cpu, "uses_onednn", lambda like: True)
    q, k, v = (torch.randn(90, h, 8, requires_grad=True) for h in (4, 2, 2))
    before = settings.fp32_precision
    with Libraries() as libraries, cpu.fastest_product(q, cpu.LEAST_PRODUCT):
        for few, window in ((0, 0), (0, 9), (1 << 20, 0)):
            monkeypatch.setattr(attention, "FEW_SCORES", few)
            attention.PackedAttention([50, 40])(0, q * 2, k * 2, v, window).sum().backward()
    seen = libraries.seen
    fused = {n: found for n, found in seen.items() if "attention" in n}
    assert len(fused) == 2 and set.union(*fused.values()) == {"none"}, fused
    assert seen["aten::bmm"] == seen["aten::mul.Tensor"] == {"bf16"}
    assert settings.fp32_precision == before


def test_a_step_of_generation_takes_the_faster_library_but_for_its_attention(monkeypatch):
    monkeypatch.setattr(cpu, "uses_onednn", lambda like: True)
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    rows = -(-cpu.LEAST_PRODUCT // model.config.hidden_size**2)
    for n, body in ((rows, "bf16"), (rows - 1, "none")):
        with Libraries() as libraries:  # prompts of one token: there is no prefill
            generate(model, [[5]] * n, 2, [], temperature=1.0, seeds=range(n), batch_size=n)
        assert libraries.seen["aten::bmm"] == {"none"}
        assert body in libraries.seen["aten::mm"] | libraries.seen["aten::addmm"]
        assert libraries.seen["aten::addmm"] == {body}  # those with a bias: queries, keys, values


def test_forward_and_backward_take_the_faster_library(monkeypatch):
    monkeypatch.setattr(cpu, "uses_onednn", lambda like: True)
    monkeypatch.setattr(cpu, "LEAST_PRODUCT", 1)
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    batch = random_batch(2, 24, 500)
    with Libraries() as libraries:
        forward_backward(model, [], sft_loss, batch, 1.0, 8192, torch.device("cpu"))
    assert libraries.seen["aten::mm"] == libraries.seen["aten::addmm"] == {"bf16"}


def test_buffers_of_logits_come_after_the_gradients_and_serve_all_chunks(monkeypatch):
    """Else memory that a step frees does not fit what the next one wants (LOG.md)."""
    made, wide_buffer, of_a_block = [], chunk.wide_buffer, []
    monkeypatch.setattr(chunk, "BLOCK_ELEMENTS", 2 * 40 * 2)  # two rows of both models
    monkeypatch.setattr(chunk, "wide_buffer", lambda *a: made.append(a[:2]) or wide_buffer(*a))
    hidden, head = torch.randn(7, 8), torch.randn(50, 8)
    other = torch.randn(50, 8)

    def block_loss(student_bV, teacher_bV, rows, want_grad):
        of_a_block.append(len(student_bV))
        return (student_bV - teacher_bV).sum(1)

    step = chunk.torch_step(block_loss, 3, 40, hidden, (hidden, other[:40]))
    assert not made
    for start in (0, 3, 6):
        rows = slice(start, min(start + 3, 7))
        loss_n, _ = step(hidden[rows], head, rows, False)
        want_n = (hidden[rows] @ (head[:40] - other[:40]).t()).sum(1)
        torch.testing.assert_close(loss_n, want_n, rtol=1e-4, atol=1e-4)
    assert made == [(3, 40), (3, 40)] and of_a_block == [2, 1, 2, 1, 1]


def test_the_optimizer_has_its_moments_at_once_and_steps_as_adamw_does():
    model = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    plain = build_model(PRESETS["tiny"], None, device="cpu", seed=0)
    model.norm.weight.requires_grad_(False)
    plain.norm.weight.requires_grad_(False)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1)
    assert {id(p) for p in optimizer.state} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    groups = []
    for group in optimizer.param_groups:
        names = {id(p): name for name, p in model.named_parameters()}
        params = [plain.get_parameter(names[id(p)]) for p in group["params"]]
        groups.append({"params": params, "weight_decay": group["weight_decay"]})
    lazy = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-8, fused=True)
    for _ in range(3):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            if p.requires_grad:
                p.grad = torch.randn_like(p)
                q.grad = p.grad.clone()
        optimizer.step()
        lazy.step()
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_attention_is_the_same_in_parts_at_once_and_fused(monkeypatch):
    q, k, v, weight = (torch.randn(138, h, 8, dtype=torch.float64) for h in (4, 2, 2, 4))
    parts, by_products, found = [], attention.attend_by_products, []

    def counted(q_BHLE, *rest):
        parts.append(len(q_BHLE))
        return by_products(q_BHLE, *rest)

    monkeypatch.setattr(attention, "attend_by_products", counted)
    for few in (0, 4 * 50**2, 2 * 4 * 50**2, 1 << 20):
        monkeypatch.setattr(attention, "FEW_SCORES", few)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention.PackedAttention([50, 48, 40])(0, *leaves)
        found.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    assert parts == [1, 1, 1, 2, 1, 3]
    for other in found[1:]:
        for one, fused in zip(other, found[0], strict=True):
            torch.testing.assert_close(one, fused, rtol=1e-12, atol=1e-12)


def test_onednn_is_refused_where_it_rounds(fresh_choice, monkeypatch):
    monkeypatch.setattr(cpu, "_has_amx", lambda: True)
    assert not cpu.onednn_is_exact()
    # a CPU that rounds without being known for it: the measurement finds an error of 1e-3
    cpu.onednn_is_exact.cache_clear()
    monkeypatch.setattr(cpu, "_has_amx", lambda: False)
    matmul = torch.Tensor.__matmul__

    def rounding(a, b):
        if torch.backends.mkldnn.matmul.fp32_precision == "bf16" and a.dtype == torch.float32:
            return matmul(a.bfloat16().float(), b.bfloat16().float())
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not cpu.onednn_is_exact()
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_softmax_of_a_whole_vocabulary(temperature):
    logits = 4 * torch.randn(3, 151_665)
    exact = logits.double() / temperature
    p, normalizer = softmax(logits, temperature, torch.empty_like(logits))
    log_p = exact.log_softmax(1)  # an exponent of fp32 has an error that grows with its size
    sizes = 5 - log_p
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":  # the product in it is rounded, too
        sizes = sizes + exact.abs()
    assert ((p.double() / log_p.exp() - 1).abs() < 1e-7 * sizes).all()
    assert torch.allclose(normalizer.double(), exact.logsumexp(1, keepdim=True), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_the_gradient_of_an_embedding(tied):
    weight = torch.nn.Parameter(torch.randn(11, 5, dtype=torch.float64))
    twin = torch.nn.Parameter(weight.detach().clone())
    for tokens in (torch.tensor([3, 3, 0, 10]), torch.tensor([10, 2])):  # two micro-batches
        x, y = embed(tokens, weight, tied), F.embedding(tokens, twin)
        assert torch.equal(x, y)
        (x.square() @ weight.t()).cos().sum().backward()
        (y.square() @ twin.t()).cos().sum().backward()
    assert torch.allclose(weight.grad, twin.grad, rtol=1e-12, atol=1e-12)
    weight.grad = None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        embed(torch.tensor([1, 1]), weight, tied).sum().backward()  # no head in the loss
    ran = {event.key for event in profile.key_averages()}
    assert ("aten::embedding_dense_backward" in ran) != tied, "a second matrix of the whole head"
    assert torch.equal(weight.grad, 2 * F.one_hot(torch.tensor(1), 11)[:, None] * torch.ones(5))
    assert not embed(torch.tensor([1]), weight.detach(), tied).requires_grad
    with torch.no_grad():
        assert not embed(torch.tensor([1]), weight, tied).requires_grad


@pytest.mark.parametrize("vocab", [151, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_of_wide_matrices_lie_apart(vocab, dtype, monkeypatch):
    """Every product meets rows of logits and of their gradients a multiple of 64 apart."""
    distances = []

    def spy(a, b, out, add=False):
        wide = [x for x in (a, a.t(), b, b.t(), out) if x.dim() == 2 and x.shape[1] == vocab]
        distances.extend(x.stride(0) for x in wide if x.stride(1) == 1)
        return product(a, b, out, add)

    monkeypatch.setattr("kernels.chunk.product", spy)
    monkeypatch.setattr("kernels.linear_topk.product", spy)
    hidden, head = torch.randn(9, 6, dtype=dtype), torch.randn(vocab + 3, 6, dtype=dtype)
    hidden.requires_grad_()
    head.requires_grad_()
    weight, target = torch.ones(9), torch.arange(9)
    loss, _ = linear_kl(hidden, head, hidden, head, weight, "reverse_kl", vocab=vocab, chunk_rows=4)
    other, _ = linear_logprob(hidden, head, target, weight, lambda logp, *_: -logp, vocab=vocab)
    (loss + other).backward()
    topk_logprobs(hidden, head, 3, vocab=vocab)
    assert len(distances) >= 15
    assert all(distance % 64 == 0 and distance % 4096 for distance in distances)


@pytest.mark.parametrize("rows", [0, 1, 220, 221, 568, 4096])
@pytest.mark.parametrize("models", [1, 2])
def test_chunks_have_one_size_within_the_budget(rows, models):
    budget, vocab = CHUNK_ELEMENTS["cpu"], 151_665
    size = default_chunk_rows(vocab, rows, torch.device("cpu"), models)
    assert 1 <= size and size * vocab * models <= budget
    chunks = -(-rows // size)
    assert chunks == -(-rows // (budget // (vocab * models)))  # no more than are needed
    assert rows == 0 or chunks * size - rows < chunks  # and none is short by more than a row each
