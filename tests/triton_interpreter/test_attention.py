"""The attention kernels against fp64, interpreted in fp32 and fp64 (its bf16 product is wrong).

See test_head.py.
"""

import os

import pytest
import torch
from torch import library

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 chooses the interpreter", allow_module_level=True)

from triton.runtime.interpreter import interpreter_builder

from kernels import backend, decode_attention, triton_attention
from kernels.attention import PackedAttention
from kernels.triton_attention import Config, Configs
from model.presets import PRESETS

SHAPES = sorted(
    {
        (c.num_heads, c.num_kv_heads, c.head_dim)
        for name, c in PRESETS.items()
        if name.startswith("qwen")
    }
)
TILE = 16
RAGGED = [0, 1, TILE - 1, TILE, 0, TILE + 1, 2 * TILE + 5]
# Queries and keys at a time, and windows: one key, less than a tile, a tile and about, several.
WINDOWS = [(16, 16, 1), (16, 16, 2), (16, 32, 16), (32, 16, 17), (16, 16, 40)]


@pytest.fixture(autouse=True)
def by_kernel(monkeypatch):
    """Every call takes the kernels, with several tiles to a document; the reference is removed."""
    backend.use("triton")
    monkeypatch.setattr(triton_attention, "TILE", TILE)
    monkeypatch.delattr(PackedAttention, "_by_blocks")
    yield
    backend.use("auto")


def tensors(lengths, heads, kv_heads, size, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(sum(lengths), n, size, generator=g, dtype=dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def formula(q_THE, k_TKE, v_TKE, lengths, window=0):
    """Causal attention as it is defined, in fp64: a document, a head and a query at a time.

    With a window a query sees that many keys, its own the last.
    """
    outputs, group = [], q_THE.shape[1] // k_TKE.shape[1]
    for q, k, v in zip(*(x.double().split(lengths) for x in (q_THE, k_TKE, v_TKE)), strict=True):
        for i in range(len(q)):
            heads = []
            for h in range(q.shape[1]):
                seen = slice(max(0, i + 1 - window) if window else 0, i + 1)
                score = (k[seen, h // group] * q[i, h]).sum(1) / q.shape[2] ** 0.5
                e = (score - score.detach().max()).exp()
                heads.append((e[:, None] * v[seen, h // group]).sum(0) / e.sum())
            outputs.append(torch.stack(heads))
    return torch.stack(outputs)


def faster(q_THE, k_TKE, v_TKE, lengths, window=0):
    """`formula` by matrices, for the larger cases. `test_the_formulas_agree` compares them."""
    outputs, group = [], q_THE.shape[1] // k_TKE.shape[1]
    for q, k, v in zip(*(x.double().split(lengths) for x in (q_THE, k_TKE, v_TKE)), strict=True):
        score = torch.einsum("ihe,jhe->hij", q, k.repeat_interleave(group, 1)) / q.shape[2] ** 0.5
        hidden = torch.ones(len(q), len(q)).triu(1)
        if window:
            hidden += torch.ones(len(q), len(q)).tril(-window)
        score = score.masked_fill(hidden.bool(), -torch.inf)
        outputs.append(
            torch.einsum("hij,jhe->ihe", score.softmax(2), v.repeat_interleave(group, 1))
        )
    return torch.cat(outputs)


def assert_close(got, want, tolerance=2e-6):
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-300)
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def run(qkv, lengths, upstream, window=0):
    o, _ = triton_attention.attention(*qkv, PackedAttention(lengths).tiles, window)
    return o.detach(), *torch.autograd.grad(o, qkv, upstream)


def exact(qkv, lengths, upstream, window=0):
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    o = faster(*leaves, lengths, window)
    return o.detach(), *torch.autograd.grad(o, leaves, upstream.double())


def use(monkeypatch, configs):
    """Let all calls take these configurations, or one for all three kernels."""
    if isinstance(configs, Config):
        configs = Configs(configs, configs, configs)
    monkeypatch.setattr(triton_attention, "configs_for", lambda device, size: configs)


def test_the_formulas_agree():
    qkv = tensors([3, 0, 1, 9], 4, 2, 16, torch.float64)
    for window in (0, 1, 4):
        want = formula(*qkv, [3, 0, 1, 9], window)
        assert_close(faster(*qkv, [3, 0, 1, 9], window), want, 1e-14)


@pytest.mark.parametrize("heads,kv_heads,size", SHAPES, ids=str)
def test_presets(heads, kv_heads, size):
    """Groups and head dimensions of Qwen2.5 and Qwen3, with one group, or two small ones."""
    lengths, group = [0, 1, TILE - 1, TILE, TILE + 1], heads // kv_heads
    kept = max(1, 4 // group)
    qkv, upstream = (
        tensors(lengths, group * kept, kept, size),
        torch.randn(sum(lengths), group * kept, size),
    )
    for got, want in zip(run(qkv, lengths, upstream), exact(qkv, lengths, upstream), strict=True):
        assert got.dtype == torch.float32 and torch.isfinite(got).all()
        assert_close(got, want)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows,keys", [(16, 16), (64, 16), (16, 64)])
def test_tiles(rows, keys, transposed, monkeypatch):
    """More queries than keys at a time or fewer, several programs to a tile, both layouts."""
    monkeypatch.setattr(triton_attention, "TILE", 64)
    use(monkeypatch, Config(rows, keys, 4, 1, transposed))
    lengths = [65, 1, 0, 20]
    qkv, upstream = tensors(lengths, 2, 1, 16), torch.randn(sum(lengths), 2, 16)
    for got, want in zip(run(qkv, lengths, upstream), exact(qkv, lengths, upstream), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("rows,keys,window", WINDOWS)
def test_windows(rows, keys, window, monkeypatch):
    """Queries see a window of keys: values, gradients, and each document by itself to the bit."""
    use(monkeypatch, Config(rows, keys, 4, 1, transposed=window % 2 == 0))
    monkeypatch.setattr(triton_attention, "TILE", 32)
    lengths = [50, 0, 20]
    qkv, upstream = tensors(lengths, 2, 1, 16), torch.randn(sum(lengths), 2, 16)
    got = run(qkv, lengths, upstream, window)
    for a, b in zip(got, exact(qkv, lengths, upstream, window), strict=True):
        if b.any():
            assert_close(a, b)
        else:  # a window of one key: its weight is 1, whatever the score
            assert a.abs().max() < 1e-5
    last = [x.detach()[50:].requires_grad_() for x in qkv]
    for a, b in zip(run(last, [20], upstream[50:], window), got, strict=True):
        assert torch.equal(a, b[50:])


def test_a_window_of_everything_is_none_to_the_bit():
    lengths = [2, TILE + 5]
    qkv, upstream = tensors(lengths, 2, 1, 16), torch.randn(sum(lengths), 2, 16)
    want = run(qkv, lengths, upstream)
    for window in (TILE + 5, 2**31 - 1):
        got = run(qkv, lengths, upstream, window)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_keys_beyond_a_window_are_never_seen():
    """Not even where they hold no numbers, and no gradient reaches them."""
    lengths, window = [60], 9
    qkv, upstream = tensors(lengths, 2, 1, 16), torch.zeros(60, 2, 16)
    upstream[50:] = torch.randn(10, 2, 16)
    want = run(qkv, lengths, upstream, window)
    for x in qkv[1:]:
        x.data[:42] = torch.randn(42, 1, 16) * 1e3
    got = run(qkv, lengths, upstream, window)
    assert all(torch.equal(a[50:], b[50:]) for a, b in zip(got[:2], want[:2], strict=True))
    for a, b in zip(got[2:], want[2:], strict=True):
        assert torch.equal(a, b) and not a[:42].any() and a[42:].any(2).all()


@pytest.mark.parametrize("size,window", [(64, 0), (128, 0), (256, 100)])
def test_the_configurations_of_a_gpu(size, window, monkeypatch):
    monkeypatch.setattr(triton_attention, "TILE", 128)
    lengths = [129, 0, 70]
    qkv, upstream = tensors(lengths, 2, 1, size), torch.randn(sum(lengths), 2, size)
    want = exact(qkv, lengths, upstream, window)
    for table in triton_attention.CONFIGS.values():
        use(monkeypatch, table[size])
        for got, exactly in zip(run(qkv, lengths, upstream, window), want, strict=True):
            assert_close(got, exactly)


@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(transposed, monkeypatch):
    use(monkeypatch, Config(16, 16, 4, 1, transposed))
    lengths = [1, 0, 17]
    qkv = tensors(lengths, 2, 1, 16, torch.float64)
    attend = PackedAttention(lengths)
    assert torch.autograd.gradcheck(
        lambda *x: attend(0, *x), qkv, fast_mode=True, atol=1e-6, rtol=1e-6
    )
    upstream = torch.randn(sum(lengths), 2, 16, dtype=torch.float64)
    for got, want in zip(run(qkv, lengths, upstream), exact(qkv, lengths, upstream), strict=True):
        assert_close(got, want, 1e-13)


def test_the_operator_keeps_torchs_rules():
    """Fake kernels agree with real ones and autograd is registered, as torch.compile needs it."""
    lengths = [5, 0, 20]
    tiles = PackedAttention(lengths).tiles
    library.opcheck(
        triton_attention.attention,
        (*tensors(lengths, 2, 1, 16), tiles),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    q, k, v = (x.detach() for x in tensors(lengths, 2, 1, 16))
    o, lse = triton_attention.attention(q, k, v, tiles)
    library.opcheck(
        triton_attention.attention_backward,
        (q, k, v, o, lse, q, tiles, 3),
        test_utils=("test_schema", "test_faketensor"),
    )
    library.opcheck(
        decode_attention._decode,
        (*cache_case(2, 1, 16, [5, 0], 1), 3, torch.zeros(4, dtype=torch.int32)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_body_compiles_whole():
    """Forward and backward in one graph, which further maps of tiles do not compile again."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def body(x, attend):
        return attend(0, x.sin(), x[:, :1].cos(), x[:, 1:] * 2).square().sum()

    compiled, x = torch.compile(body, backend=counter, fullgraph=True), tensors([18], 2, 1, 16)[0]
    for lengths in ([17, 1], [18], [9, 0, 9], [1, 17]):
        loss, want = (f(x, PackedAttention(lengths)) for f in (compiled, body))
        assert torch.equal(*(torch.autograd.grad(y, x)[0] for y in (loss, want))) and torch.equal(
            loss, want
        )
    assert counter.frame_count <= 2


def test_packed_equals_one_by_one_to_the_bit():
    qkv, upstream = tensors(RAGGED, 2, 2, 16), torch.randn(sum(RAGGED), 2, 16)
    together = [x.split(RAGGED) for x in run(qkv, RAGGED, upstream)]
    for i, n in enumerate(RAGGED):
        alone = run(
            [x.detach().split(RAGGED)[i].requires_grad_() for x in qkv],
            [n],
            upstream.split(RAGGED)[i],
        )
        assert all(torch.equal(a, t[i]) for a, t in zip(alone, together, strict=True))


def test_a_document_changes_no_other_documents_bits():
    """Not even one that holds no numbers."""
    lengths = [1, TILE + 1, 0, TILE + 4, TILE]
    upstream, changed = torch.randn(sum(lengths), 1, 16), 3
    before = [x.split(lengths) for x in run(tensors(lengths, 1, 1, 16), lengths, upstream)]
    for value in (0.5, float("nan")):
        qkv = tensors(lengths, 1, 1, 16)
        for x in qkv:
            x.data.split(lengths)[changed].mul_(value)
        after = [x.split(lengths) for x in run(qkv, lengths, upstream)]
        for b, a in zip(before, after, strict=True):
            assert all(torch.equal(b[i], a[i]) for i in range(len(lengths)) if i != changed)
            assert not torch.equal(b[changed], a[changed]) and torch.isnan(a[changed]).all() == (
                value != value
            )


def test_extreme_scores():
    """Scores of ±1e4: the softmax is one-hot or a tie, and nothing overflows.

    Inputs are small integers times powers of two, so their products are exact.
    """
    lengths, g = [40, 5], torch.Generator().manual_seed(0)
    qkv = tensors(lengths, 2, 1, 16)
    for x in qkv[:2]:
        x.data.copy_(torch.randint(-2, 3, x.shape, generator=g) * 64.0)
    scores = torch.einsum("ihe,je->hij", qkv[0], qkv[1][:, 0]) / 4
    assert scores.max() > 1e4 and scores.min() < -1e4
    upstream = torch.randn(45, 2, 16)
    for got, want in zip(run(qkv, lengths, upstream), exact(qkv, lengths, upstream), strict=True):
        assert torch.isfinite(got).all()
        assert_close(
            got, want, 1e-3
        )  # log2 of the sum is kept in fp32: its last bit is 1e-3 at 1.5e4


def test_log_sum_exp_is_kept():
    lengths = [20, 1, 33]
    q, k, v = (x.detach() for x in tensors(lengths, 2, 1, 16))
    _, lse = triton_attention.attention(q, k, v, PackedAttention(lengths).tiles)
    want = []
    for a, b in zip(q.double().split(lengths), k.double().split(lengths), strict=True):
        score = torch.einsum("ihe,je->hij", a, b[:, 0]) / 4
        want.append(
            score.masked_fill(torch.ones(len(a), len(a)).triu(1).bool(), -torch.inf).logsumexp(2)
        )
    assert_close(lse * torch.tensor(2.0).log(), torch.cat(want, 1), 1e-6)


def test_the_map_of_tiles():
    lengths = [0, 33, 1, 16, 0, 50, 17]
    by_keys, by_queries = triton_attention.tile_map(lengths).tolist()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    every = sorted(
        [s, n, at] for s, n in zip(starts, lengths, strict=True) for at in range(0, n, TILE)
    )
    assert sorted(by_keys) == sorted(by_queries) == every
    keys, queries = [min(at + TILE, n) for _, n, at in by_keys], [n - at for _, n, at in by_queries]
    assert keys == sorted(keys, reverse=True) and queries == sorted(queries, reverse=True)
    assert (
        triton_attention.tile_map([]).shape == triton_attention.tile_map([0, 0]).shape == (2, 0, 3)
    )


def test_nothing_to_do_and_what_does_not_fit():
    q, k, _ = tensors([0], 2, 1, 16)
    for lengths in ([], [0, 0]):
        o = PackedAttention(lengths)(0, q, k, k)
        assert o.shape == (0, 2, 16) and torch.autograd.grad(o.sum(), q)[0].shape == q.shape
    with pytest.raises(ValueError, match="3 tokens"):
        PackedAttention([2])(0, *tensors([3], 2, 1, 16))
    strided = torch.randn(20, 2, 32)[..., ::2]
    q, k, v = tensors([20], 2, 1, 16)
    assert torch.equal(
        PackedAttention([20])(0, strided, k, v),
        PackedAttention([20])(0, strided.contiguous(), k, v),
    )


# --- decode --------------------------------------------------------------------------------------


def cache_case(heads, kv_heads, size, lengths, steps, slots=700):
    """(queries, keys, values, lengths); slots beyond a sequence's end hold no numbers."""
    g = torch.Generator().manual_seed(0)
    q = torch.randn(len(lengths), steps, heads, size, generator=g)
    k, v = torch.randn(2, len(lengths), kv_heads, slots, size, generator=g)
    for row, n in enumerate(lengths):
        k[row, :, n:], v[row, :, n:] = float("nan"), float("nan")
    return q, k, v, torch.tensor(lengths)


def decode_formula(q, k, v, lengths, window=0):
    out, (_, steps, heads, size) = torch.zeros(q.shape, dtype=torch.float64), q.shape
    for b, n in enumerate(lengths):
        for i in range(steps):
            end = max(0, n - steps + i + 1)
            seen = slice(max(0, end - window) if window else 0, end)
            for h in range(heads if end else 0):
                keys, values = (x[b, h // (heads // k.shape[1]), seen].double() for x in (k, v))
                out[b, i, h] = ((keys * q[b, i, h].double()).sum(1) / size**0.5).softmax(0) @ values
    return out


EDGES = [0, 1, 255, 256, 257, 513, 700, 63, 64, 65]


@pytest.mark.parametrize("heads,kv_heads,size", SHAPES, ids=str)
def test_decode_presets(heads, kv_heads, size):
    kept = min(kv_heads, 2)
    q, k, v, n = cache_case(heads // kv_heads * kept, kept, size, EDGES[:6], 1)
    got, want = decode_attention.decode_attention(q, k, v, n), decode_formula(q, k, v, EDGES[:6])
    assert_close(got, want)
    assert_close(decode_attention.decode_reference(q, k, v, n), want)
    assert not got[0].any()


@pytest.mark.parametrize("steps", [2, 8])
def test_decode_of_several_tokens(steps):
    """A sequence may be shorter than the step: tokens before slot 0 see nothing."""
    q, k, v, n = cache_case(6, 2, 16, EDGES[:6], steps)
    want = decode_formula(q, k, v, EDGES[:6])
    assert_close(decode_attention.decode_attention(q, k, v, n.int()), want)
    assert_close(decode_attention.decode_reference(q, k, v, n), want)


@pytest.mark.parametrize("steps,window", [(1, 1), (1, 257), (4, 3), (4, 300)])
def test_decode_with_a_window(steps, window):
    """Blocks before the window hold no numbers, nor does what the kernels leave unwritten."""
    lengths = [1, 5, 256, 300, 558, 700]
    q, k, v, n = cache_case(2, 1, 16, lengths, steps)
    want = decode_formula(q, k, v, lengths, window)
    assert_close(decode_attention.decode_reference(q, k, v, n, window), want)
    for row, length in enumerate(lengths):
        before = max(0, length - steps + 1 - window) // decode_attention.BLOCK
        k[row, :, : before * decode_attention.BLOCK] = float("nan")
        v[row, :, : before * decode_attention.BLOCK] = float("nan")
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        got = decode_attention.decode_attention(q, k, v, n, window)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_close(got, want)
    alone = decode_attention.decode_attention(
        q[4:5], k[4:5, :, :600], v[4:5, :, :600], n[4:5], window
    )
    assert torch.equal(alone[0], got[4])


def test_decode_with_a_window_of_everything_is_decode_without():
    q, k, v, n = cache_case(2, 1, 256, [0, 1, 300, 700], 8)
    want = decode_attention.decode_attention(q, k, v, n)
    assert_close(want, decode_formula(q, k, v, [0, 1, 300, 700]))
    for window in (700, 2**31 - 1):
        assert torch.equal(decode_attention.decode_attention(q, k, v, n, window), want)


def test_decode_does_not_depend_on_the_batch_or_the_cache():
    q, k, v, n = cache_case(4, 2, 16, EDGES, 1)
    whole = decode_attention.decode_attention(q, k, v, n)
    roomy = [torch.cat((x, torch.full_like(x[:, :, :300], float("nan"))), 2) for x in (k, v)]
    for row in range(len(EDGES)):
        alone = decode_attention.decode_attention(
            q[row : row + 1], *(x[row : row + 1] for x in roomy), n[row : row + 1]
        )
        assert torch.equal(alone[0], whole[row])
    fewer = decode_attention.decode_attention(
        q[:3], k, v, n[:3]
    )  # the first rows of a larger cache
    assert torch.equal(fewer, whole[:3])


@pytest.mark.parametrize("window", [0, 150])
def test_decode_joins_whoever_comes_last(window, monkeypatch):
    """Programs in any order: the same bits, and counters that are ready for the next call."""
    monkeypatch.setattr(decode_attention, "SPLIT", 64)
    q, k, v, n = cache_case(6, 1, 16, [700, 129, 64], 3, slots=704)
    arrived = torch.zeros(3 * 3 * 6, dtype=torch.int32)
    want = decode_attention.decode_attention(q, k, v, n, window, arrived)
    assert_close(want, decode_formula(q, k, v, n.tolist(), window))
    set_index, splits = interpreter_builder.set_grid_idx, 11
    orders = [list(reversed(range(splits)))]
    for seed in range(2):
        orders.append(torch.randperm(splits, generator=torch.Generator().manual_seed(seed)))
    for order in orders:

        def elsewhere(x, y, z, order=order):
            set_index(int(order[x]), y, z)

        with monkeypatch.context() as patch:
            patch.setattr(interpreter_builder, "set_grid_idx", elsewhere)
            got = decode_attention.decode_attention(q, k, v, n, window, arrived)
        assert torch.equal(got, want) and not arrived.any()


def test_decode_takes_extreme_scores_and_refuses_other_layouts():
    q, k, v, n = cache_case(2, 1, 16, [300, 600], 1)
    q, k = (q * 50).round() * 4, (k * 16).round()
    assert (
        decode_formula(q, k, k, [300, 600]).isfinite().all()
        and (q[0, 0, 0] @ k[0, 0, :300].T / 4).abs().max() > 3e3
    )
    assert_close(
        decode_attention.decode_attention(q, k, v, n), decode_formula(q, k, v, [300, 600]), 1e-5
    )
    with pytest.raises(ValueError, match="strides"):
        decode_attention.decode_attention(q, torch.stack((k, k), 3)[:, :, :, 0], v, n)


def test_decode_continues_the_packed_attention():
    """Prefill and decode agree: the last tokens of documents, computed either way."""
    lengths, steps = [40, 17, 5], 3
    q, k, v = (x.detach() for x in tensors(lengths, 4, 2, 16))
    packed = PackedAttention(lengths)(0, q, k, v).split(lengths)
    cache = torch.full((2, 3, 2, 64, 16), float("nan"))
    for row, (a, b) in enumerate(zip(k.split(lengths), v.split(lengths), strict=True)):
        cache[0, row, :, : len(a)], cache[1, row, :, : len(b)] = (
            a.transpose(0, 1),
            b.transpose(0, 1),
        )
    got = decode_attention.decode_attention(
        torch.stack([x[-steps:] for x in q.split(lengths)]), *cache, torch.tensor(lengths)
    )
    for row in range(3):
        assert_close(got[row], packed[row][-steps:])
