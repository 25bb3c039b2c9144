"""The Triton head's rounding, step by step in PyTorch: how good is a gradient of 2-byte logits?

A GPU keeps a tile's logits as fp16 differences from its largest, log Σ e from fp32 before that,
and writes gradients as bf16 (kernels/triton_head.py). Teacher and student are close here: the
gradient is then a small difference of what was rounded.
"""

import itertools

import pytest
import torch

from tests import reference

V, TILE = 151_665, 128


def kept(logits_NV, dtype, how):
    """Logits as they come back from two bytes: as they are, or less the row's or tile's largest."""
    if how == "whole":
        return logits_NV.to(dtype).float()
    wide = torch.nn.functional.pad(logits_NV, (0, -V % TILE), value=float("-inf"))
    wide = wide.unflatten(1, (-1, TILE)) if how == "tile" else wide.unsqueeze(1)
    largest = wide.amax(2, keepdim=True)
    return ((wide - largest).to(dtype).float() + largest).flatten(1)[:, :V]


def gradient_error(name, logits_s, logits_t, dtype, how, temperature=1.0):
    """Relative error of the bf16 gradient at the logits over the temperature, against fp64."""
    exact = (logits_s.double() / temperature).requires_grad_()
    (want,) = torch.autograd.grad(
        reference.divergence(name, exact, logits_t.double() / temperature, beta=0.5).sum(), exact
    )
    ls, lt = (
        kept(z, dtype, how) / temperature - (z / temperature).logsumexp(1, keepdim=True)
        for z in (logits_s, logits_t)
    )
    ps, pt, d = ls.exp(), lt.exp(), ls - lt
    if name == "forward_kl":
        got = ps - pt
    elif name == "reverse_kl":
        got = ps * (d - (pt - ps + ps * d).sum(1, keepdim=True))
    else:
        rs = ls - torch.logaddexp(ls, lt) + 0.6931471805599453
        got = 0.5 * ps * (rs - (ps * rs - 0.5 * (ps - pt)).sum(1, keepdim=True))
    return float((got.bfloat16().double() - want).norm() / want.norm())


def close_pair(kl, peaked, seed=0):
    """Logits of a teacher and a student at a given KL: broad rows, or a few likely ids each."""
    g = torch.Generator().manual_seed(seed)
    teacher, noise = 3 * torch.randn(2, V, generator=g), torch.randn(2, V, generator=g)
    if peaked:
        teacher[:, :5] += torch.tensor([22.0, 21, 20, 18, 17])
    low, high = 0.0, 4.0
    for _ in range(20):
        middle = (low + high) / 2
        above = (
            reference.divergence(
                "forward_kl", (teacher + middle * noise).double(), teacher.double()
            ).mean()
            > kl
        )
        low, high = (low, middle) if above else (middle, high)
    return teacher + low * noise, teacher


@pytest.mark.parametrize("kl", [1e-3, 2e-2])
@pytest.mark.parametrize("peaked", [False, True])
def test_what_the_kernels_keep_is_enough(kl, peaked):
    pair = close_pair(kl, peaked)
    for name in ("forward_kl", "reverse_kl", "jsd"):
        error = {
            (dtype, how): gradient_error(name, *pair, dtype, how)
            for dtype in (torch.float16, torch.bfloat16)
            for how in ("whole", "row", "tile")
        }
        ours = error[torch.float16, "tile"]
        assert ours < 4e-3, (name, error)
        assert ours <= min(error.values()) * 1.05, (name, error)
        assert error[torch.bfloat16, "whole"] > 20 * ours, (
            name,
            error,
        )  # what a plain bf16 implementation keeps


@pytest.mark.parametrize("temperature,broad,peaked", [(2.0, 1.3e-2, 4e-3), (4.0, 4e-2, 8e-3)])
def test_what_a_temperature_costs(temperature, broad, peaked):
    """It brings the pair closer still (KL 2e-4 and 5e-5), and gives weight to low logits."""
    for bound, kind in ((broad, False), (peaked, True)):
        error = {
            dtype: gradient_error("forward_kl", *close_pair(1e-3, kind), dtype, "tile", temperature)
            for dtype in (torch.float16, torch.bfloat16)
        }
        assert error[torch.float16] < bound and error[torch.bfloat16] > 4 * error[torch.float16], (
            error
        )


if __name__ == "__main__":  # the table of LOG.md
    for kl, peaked in itertools.product((1e-3, 2e-2), (False, True)):
        pair = close_pair(kl, peaked)
        for dtype, how in itertools.product(
            (torch.bfloat16, torch.float16), ("whole", "row", "tile")
        ):
            errors = [
                f"{100 * gradient_error(name, *pair, dtype, how):7.2f}"
                for name in ("forward_kl", "reverse_kl", "jsd")
            ]
            errors += [
                f"{100 * gradient_error('forward_kl', *pair, dtype, how, t):7.2f}"
                for t in (2.0, 4.0)
            ]
            print(
                f"| {kl} | {'peaked' if peaked else 'broad'} | {str(dtype)[6:]}, {how} |",
                " | ".join(errors),
                "|",
            )
