"""RMSNorm and gated activations beside autograd's own derivatives of the same formulas."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from kernels.elementwise import ACTIVATIONS, gated, rms_norm

FORMULAS = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu_pytorch_tanh": lambda x: (
        x / 2 * (1 + (2**0.5 / torch.pi**0.5 * (x + 0.044715 * x**3)).tanh())
    ),
}


def plain_norm(x, weight, eps, offset):
    """The definition, in fp64."""
    x, weight = x.double(), weight.double() + offset
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt() * weight


def draw(*shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [x.to(dtype).requires_grad_() for x in drawn]


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 6), (0, 4), (7,)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_norm_in_fp64(shape, offset):
    x, weight, grad = draw(shape, shape[-1:], shape, dtype=torch.float64)
    got, want = rms_norm(x, weight, 1e-6, offset), plain_norm(x, weight, 1e-6, offset)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(y, [x, weight], grad) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, 1e-6, offset), got)


# relative to the norm; bf16 has 8 bits, and rounds what is multiplied and what comes out
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_norm_of_narrow_numbers(dtype, offset, scale):
    x, grad = draw((64, 96), (64, 96), dtype=dtype)
    x = (x.detach() * scale).requires_grad_()
    (weight,) = draw((96,), dtype=torch.float32, seed=1)
    got, want = rms_norm(x, weight, 1e-6, offset), plain_norm(x, weight, 1e-6, offset)
    assert got.dtype == dtype
    if not offset:  # Hugging Face's order: rounded, then multiplied
        wide = x.float()
        normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
        assert torch.equal(got, weight.to(dtype) * normal.to(dtype))
    grads = torch.autograd.grad(got, [x, weight], grad)
    wanted = torch.autograd.grad(want, [x, weight], grad.double())
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    for a, b in zip([got, *grads], [want, *wanted], strict=True):
        assert (a.double() - b).norm() < TOLERANCE[dtype] * b.norm()


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, *TOLERANCE])
def test_gates(name, dtype):
    gate, up, grad = draw((7, 33), (7, 33), (7, 33), dtype=dtype)
    gate = (gate.detach() * 5).requires_grad_()
    got, want = gated(gate, up, name), FORMULAS[name](gate.double()) * up.double()
    grads = torch.autograd.grad(got, [gate, up], grad)
    wanted = torch.autograd.grad(want, [gate, up], grad.double())
    for a, b in zip([got, *grads], [want, *wanted], strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() < TOLERANCE.get(dtype, 1e-13) * b.norm()
    with torch.no_grad():
        assert torch.equal(gated(gate, up, name), got)


def kept_bytes(function, *leaves):
    """What the backward pass keeps, each tensor once, beside what it is given."""
    given, kept = {x.untyped_storage().data_ptr() for x in leaves}, {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*leaves)
    assert out.requires_grad
    return sum(size for where, size in kept.items() if where not in given)


def test_less_is_kept_than_by_autograd():
    for dtype, offset in itertools.product(TOLERANCE, (0.0, 1.0)):
        x, weight = draw((64, 96), (96,), dtype=dtype)
        assert kept_bytes(lambda x, w, o=offset: rms_norm(x, w, 1e-6, o), x, weight) == 64 * 4
        gate, up = draw((64, 96), (64, 96), dtype=dtype)
        assert kept_bytes(lambda g, u: gated(g, u, "silu"), gate, up) == 0
        assert kept_bytes(lambda g, u: F.silu(g) * u, gate, up) == 64 * 96 * dtype.itemsize


def test_the_compiler_sees_plain_operations():
    """It finds out itself what to keep; what it traces by hand it would hold for ever."""
    graphs = []
    f = torch.compile(
        lambda x, w: gated(rms_norm(x, w, 1e-6, 0.0), x, "silu"),
        backend=lambda graph, _: graphs.append(graph) or graph.forward,
    )
    x, weight = draw((5, 8), (8,), dtype=torch.float64)
    want = gated(rms_norm(x, weight, 1e-6, 0.0), x, "silu")
    torch.testing.assert_close(f(x, weight), want, rtol=1e-12, atol=1e-12)
    assert graphs and not any("autograd" in str(n.target) for g in graphs for n in g.graph.nodes)
    torch._dynamo.reset()
