"""What the kernels of generation do, interpreted: draws from tile statistics, the whole engine.

See test_head.py.
"""

import os

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 chooses the interpreter", allow_module_level=True)

from triton.runtime.interpreter import ScanOps

from kernels import backend, triton_head, triton_sampler
from kernels.triton_head import Config
from model import generate as generation
from model import kv_cache
from model.generate import Engine, generate
from model.sampling import Sampler
from model.transformer import rope_tables, rotate
from tests.test_generate import Recorded, chi_square, exact, small, some_prompts

TEMPERATURES = [0.0, 0.6, 1.7]
FILTERS = [  # temperature, top_k, top_p; 21 tiles of 331 ids
    (1.0, 0, 0.9),
    (0.6, 0, 0.95),
    (1.7, 6, 1.0),
    (1.0, 9, 0.8),
    (1.0, 1, 1.0),
    (1.0, 0, 1e-9),
    (2.0, 300, 0.999),
]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """Tiles of 16 ids."""
    backend.use("triton")
    monkeypatch.setattr(
        triton_head, "config_for", lambda device: Config(16, 32, 16, 4, 1, tma=True, halves=True)
    )
    yield
    backend.use("auto")


def rows_and_head(n=15, vocab=331, width=20, scale=1.0):
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(n, width, generator=g), torch.randn(vocab + 6, width, generator=g)
    return hidden, head * scale, torch.rand(n, generator=g, dtype=torch.float64)


def stored(head, vocab, rows, *filters):
    """The slow sampler, in PyTorch."""
    backend.use("torch")
    sampler = Sampler(head, vocab, rows, *filters)
    assert not sampler.by_kernel
    backend.use("triton")
    return sampler


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("vocab,width", [(331, 20), (1, 4), (17, 68)])
def test_the_same_number_draws_the_same_id(temperature, vocab, width):
    hidden, head, u = rows_and_head(vocab=vocab, width=width, scale=width**-0.5)
    sampler = Sampler(head, vocab, 15, temperature)
    assert sampler.by_kernel and sampler.logits_BP.shape[0] == 1  # no room for logits
    ids, logp = sampler(hidden, u)
    want_ids, want_logp = stored(head, vocab, 15, temperature)(hidden, u)
    assert (torch.equal(ids, want_ids) and len(set(ids.tolist())) > 5) or vocab == 1
    exact = (hidden.double() @ head[:vocab].double().T / (temperature or 1)).log_softmax(1)
    exact = exact.gather(1, ids[:, None])[:, 0]
    assert (logp - exact).abs().max() < 2e-6 >= logp.max()
    assert (logp - want_logp).abs().max() < 1e-5


@pytest.mark.parametrize("filters", [(0.0,), (1.0,), (1.0, 5), (1.0, 0, 0.9)], ids=str)
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_draws_an_id_of_the_vocabulary(filters, number):
    hidden, head, u = rows_and_head(4, vocab=37)
    hidden[3] = number
    ids, logp = triton_sampler.draw(hidden, head[:37], filters[0], u, *filters[1:])
    assert 0 <= ids.min() and ids.max() < 37 and logp.isnan().nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_every_id_has_its_probability(temperature):
    """The borders between ids, all of them: so the distribution is exact, but for rounding."""
    hidden, head, _ = rows_and_head(1, 37)
    p = (hidden.double() @ head[:37].double().T * 0.4 / temperature).softmax(1)[0]
    above, near = p.cumsum(0), 2e-6
    wide = p > 3 * near
    u = torch.cat(((above - p)[wide] + near, above[wide] - near))
    ids, _ = triton_sampler.draw(hidden.expand(len(u), -1) * 0.4, head[:37], temperature, u)
    assert wide.sum() > 30 and torch.equal(ids, torch.arange(37)[wide].repeat(2))


def test_an_id_without_probability_is_never_drawn():
    """Whole tiles of them, the first and the last ids; and random numbers at both ends."""
    hidden, head, _ = rows_and_head(8, 90, 8)
    hidden[:, 0], head[:, 0] = 1.0, 0.0
    masked = [*range(18), 40, *range(64, 90)]
    head[masked] = 0.0
    head[masked, 0] = -torch.inf
    u = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.5, 0.2, 2.0**-40, 1 - 2.0**-40, 0.7, 0.9]).double()
    ids, logp = triton_sampler.draw(hidden, head[:90], 1.0, u)
    assert not set(ids.tolist()) & set(masked) and logp.isfinite().all()
    assert ids[0] == ids[4] == 18 and ids[1] == ids[5] == 63
    ids, _ = triton_sampler.draw(hidden[:1] * 1e4, head[64:66].clone().fill_(1.0), 1.0, u[:1])
    assert ids[0] == 0


@pytest.mark.parametrize("filters,other", [((), -torch.inf), ((4,), -3.0)], ids=str)
def test_rounding_of_the_sums_draws_no_id_without_probability(filters, other, monkeypatch):
    """A GPU adds up in a tree: a place without mass may get another sum than the one before."""
    summed, noise = ScanOps.cumsum, 1e-9

    def uneven(self, input):
        sums, numbers = summed(self, input), input.handle.data
        if numbers.dtype == np.float64:
            sums[0].handle.data += noise * (numbers == 0)
        return sums

    monkeypatch.setattr(ScanOps, "cumsum", uneven)
    hidden = torch.tensor([[1.0, 0, 0, 0]] * 3)
    head = torch.zeros(80, 4)
    head[:, 0] = other
    head[[3, 20, 23, 60]] = 0.0
    # just behind the ids 3 and 23, and at the end, where no sum of an id exceeds the target
    u = torch.tensor([0.25 + noise / 8, 0.75 + noise / 8, 1 - 2.0**-53], dtype=torch.float64)
    ids, logp = triton_sampler.draw(hidden, head, 1.0, u, *filters)
    assert ids.tolist() == [20, 60, 60]
    assert (logp + np.log(4 + 76 * np.exp(other))).abs().max() < 1e-6


def test_greedy_takes_the_first_of_equals():
    hidden, head, u = rows_and_head(4, 90, 8)
    for ids in ((20, 25), (20, 77)):  # in one tile, and in two
        head[list(ids)] = 3 * hidden.sum(0)
        drawn, _ = triton_sampler.draw(hidden[:1], head[:90], 0.0, u[:1])
        want = stored(head, 90, 1, 0.0)(hidden[:1], u[:1])[0]
        assert drawn[0] == want[0]
        head[list(ids)] = hidden[0] * 9
        drawn, _ = triton_sampler.draw(hidden[:1], head[:90], 0.0, u[:1])
        assert drawn[0] == 20


# --- top-k and top-p -----------------------------------------------------------------------------


def kept_by(hidden, head, temperature, top_k, top_p):
    """The probabilities that the filters leave to the ids of one row, in fp64."""
    logits = (hidden[0].double() @ head.double().T).numpy()
    return torch.from_numpy(exact(logits, temperature, top_k, top_p))


def inside(p, near=2e-6):
    """Random numbers just inside both borders of every id of some probability, and the ids."""
    wide = p > 3 * near
    above = p.cumsum(0)
    u = torch.cat(((above - p)[wide] + near, above[wide] - near))
    return u, torch.arange(len(p))[wide].repeat(2)


@pytest.mark.parametrize("block", [1024, 32])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_same_number_draws_the_same_of_what_is_kept(filters, block, monkeypatch):
    """In one piece, and in pieces of two tiles."""
    monkeypatch.setattr(triton_sampler, "BLOCK", block)
    rows = 3 if block == 1024 else 1
    hidden, head, u = rows_and_head(rows, scale=0.3)
    sampler = Sampler(head, 331, rows, *filters)
    assert sampler.by_kernel and not sampler.synchronizes and sampler.logits_BP.shape[0] == 1
    ids, logp = sampler(hidden, u)
    want_ids, want_logp = stored(head, 331, rows, *filters)(hidden, u)
    assert torch.equal(ids, want_ids) and (logp - want_logp).abs().max() < 1e-5


@pytest.mark.parametrize("filters", [(1.0, 0, 0.9), (1.7, 8, 1.0), (1.7, 11, 0.8)], ids=str)
def test_every_id_that_is_kept_has_its_probability(filters):
    hidden, head, _ = rows_and_head(1, 24, scale=0.4)
    p = kept_by(hidden, head[:24], *filters)
    u, want = inside(p)
    u = torch.stack((u, u), 1)[:, 0]  # a column
    ids, _ = triton_sampler.draw(hidden.expand(len(u), -1), head[:24], filters[0], u, *filters[1:])
    assert torch.equal(ids, want) and 4 < (p > 0).sum() < 20


@pytest.mark.parametrize("block", [1024, 32])
@pytest.mark.parametrize(
    "filters,n_kept",
    [((1.0, 0, 0.5), 40), ((1.0, 3, 1.0), 8), ((1.0, 3, 0.4), 4), ((1.0, 9, 0.9), 71)],
    ids=str,
)
def test_of_equals_top_p_keeps_the_first_and_top_k_all(filters, n_kept, block, monkeypatch):
    """80 ids, of which the 8 in every tenth place may be above the others."""
    monkeypatch.setattr(triton_sampler, "BLOCK", block)
    hidden, head = torch.ones(1, 4), torch.zeros(80, 4)
    if filters[1]:
        head[5::10, 0] = 1.0
    p = kept_by(hidden, head, *filters)
    assert (p > 0).sum() == n_kept
    u, want = inside(p)
    some = torch.tensor([0, 1, n_kept - 1, n_kept, 2 * n_kept - 2, 2 * n_kept - 1])
    u, want = u[some], want[some]
    ids, _ = triton_sampler.draw(hidden.expand(len(u), -1), head, filters[0], u, *filters[1:])
    assert torch.equal(ids, want)


@pytest.mark.parametrize("filters", [(0, 0.9), (3, 1.0), (60, 0.9), (70, 1.0)], ids=str)
def test_what_has_no_probability_is_not_kept(filters):
    """Also where top-k asks for more ids than have some."""
    hidden, head, _ = rows_and_head(4, 90, 8)
    hidden[:, 0], head[:, 0] = 1.0, 0.0
    masked = [*range(18), 40, *range(64, 96)]
    head[masked] = 0.0
    head[masked, 0] = -torch.inf
    u = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.5, 0.9]).double()
    ids, logp = triton_sampler.draw(hidden, head[:90], 1.0, u, *filters)
    want, _ = stored(head, 90, 4, 1.0, *filters)(hidden, u)
    assert torch.equal(ids, want) and logp.isfinite().all()
    assert not set(ids.tolist()) & set(masked)


@pytest.mark.parametrize("filters", [(5, 1.0), (0, 0.9)], ids=str)
def test_tiles_that_hold_nothing_that_is_kept_are_not_read(filters, monkeypatch):
    """What lies there is infinite: it would be drawn."""
    hidden, head, u = rows_and_head(2, 331, scale=3.0)
    want, _ = stored(head, 331, 2, 1.0, *filters)(hidden, u)
    logits, spoilt = triton_head.logits, []

    def spoil(*args, **options):
        tiles = logits(*args, **options)
        largest = tiles.largest_nJ
        least = largest.topk(5).values[:, -1:]
        if not filters[0]:  # a tenth of the mass, spread over all ids
            least = largest.amax(1, keepdim=True) - np.log(331 / 0.1)
        spoilt.append((largest < least).sum(1))
        tiles.z_nP.view(2, -1, tiles.tile)[largest < least] = torch.inf
        return tiles

    monkeypatch.setattr(triton_head, "logits", spoil)
    ids, _ = triton_sampler.draw(hidden, head[:331], 1.0, u, *filters)
    assert torch.equal(ids, want) and (spoilt[0] >= 8).all()


@pytest.mark.slow
def test_draws_from_a_large_vocabulary(monkeypatch):
    """Chi-square, 151,665 ids, 3,000 draws; and a temperature that is 10 % off is noticed."""
    monkeypatch.setattr(triton_head, "config_for", lambda device: Config(16, 128, 16, 4, 1))
    n, vocab = 3000, 151_665
    hidden, head, _ = rows_and_head(1, vocab, 8, scale=1.7)
    u = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tiles = triton_head.logits(hidden, head[:vocab], whole_rows=False)
    largest, sums = (x.expand(n, -1).contiguous() for x in (tiles.largest_nJ, tiles.sum_nJ))
    monkeypatch.setattr(
        triton_head,
        "logits",
        lambda *_, **__: triton_head.Logits(None, largest, sums, None, None, 128),
    )
    ids, logp = triton_sampler.draw(hidden.expand(n, -1), head[:vocab], 1.0, u)
    p = (hidden.double() @ head[:vocab].double().T)[0].softmax(0).numpy()
    counts = np.bincount(ids.numpy(), minlength=vocab)
    excess, deviation = chi_square(counts, p)
    assert excess < 4 * deviation
    warm = p**0.9 / (p**0.9).sum()
    excess, deviation = chi_square(counts, warm)
    assert excess > 6 * deviation
    assert np.abs(np.log(p[ids]) - logp.numpy()).max() < 1e-5
    want, _ = stored(head, vocab, n, 1.0)(hidden.expand(n, -1), u)
    assert (want != ids).sum() <= 2  # at a border


# --- the step of decoding ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("joint", [True, False])
def test_rotation_and_store_are_those_of_the_model(joint, dtype):
    """Of a joint product, whose parts are not contiguous, and of three."""
    heads, kv_heads, size, rows = 6, 2, 16, 5
    g = torch.Generator().manual_seed(0)
    parts = torch.randn(rows, (heads + 2 * kv_heads) * size, generator=g, dtype=dtype).split(
        [heads * size, kv_heads * size, kv_heads * size], 1
    )
    q, k, v = (x.unflatten(1, (-1, size)) for x in parts)
    if not joint:
        q, k, v = (x.clone() for x in (q, k, v))
    slot_B = torch.tensor([0, 7, 3, 19, 4])
    rope = rope_tables(slot_B, size, 1e4, dtype)
    kv = torch.full((2, rows + 2, kv_heads, 20, size), torch.nan, dtype=dtype)
    want = kv.clone()
    want[0, torch.arange(rows), :, slot_B] = rotate(k, rope)
    want[1, torch.arange(rows), :, slot_B] = v
    got = kv_cache.rotate_and_store(q, k, v, rope, kv, slot_B)
    tolerance = dict(rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14, equal_nan=True)
    torch.testing.assert_close(got, rotate(q, rope), **tolerance)
    torch.testing.assert_close(kv, want, **tolerance)
    assert torch.equal(kv[1].isnan(), want[1].isnan())


@pytest.mark.parametrize(
    "filters,more",
    [
        (dict(temperature=1.0), dict(qk_norm=True, windows=(5, 0))),
        (dict(temperature=0.0), dict()),
        (dict(temperature=1.0, top_k=20, top_p=0.9), dict()),
    ],
    ids=str,
)
def test_the_engine_by_kernels_is_the_engine_without(filters, more, monkeypatch):
    """Sampler, rotation, cache and attention together; several splits, and steps in a graph."""
    monkeypatch.setattr(generation, "record", Recorded)
    monkeypatch.setattr("kernels.decode_attention.SPLIT", 16)
    monkeypatch.setattr("kernels.decode_attention.BLOCK", 16)
    model = small(dtype=torch.float32, head_dim=16, num_heads=2, num_kv_heads=1, **more)
    prompts = some_prompts([15, 2, 1])

    def ask(kernels):
        backend.use(kernels)
        asked = Engine(model)
        options = dict(vocab=47, seeds=range(3), batch_size=2)
        got = generate(asked, prompts, 4, [3], **options, **filters)
        return got, asked._decoder

    want, _ = ask("torch")
    monkeypatch.setattr(generation, "uses_graphs", lambda cache: True)
    monkeypatch.setattr(generation, "CAPTURE_AFTER", 1)
    monkeypatch.setattr(generation, "STEPS", 2)
    Recorded.replayed, stores = 0, []
    store = kv_cache.rotate_and_store
    monkeypatch.setattr(
        kv_cache, "rotate_and_store", lambda *args: stores.append(1) or store(*args)
    )
    got, decoder = ask("triton")
    assert decoder.sampler.by_kernel and stores and not decoder.cache.arrived.any()
    assert decoder.steps == generation.STEPS and Recorded.replayed
    for a, b in zip(got, want, strict=True):
        assert a.tokens == b.tokens
        assert np.abs(np.subtract(a.logp, b.logp)).max() < 1e-5
