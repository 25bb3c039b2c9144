"""What generation keeps between calls: the copy of the weights, the cache, the recorded steps."""

import collections
import contextlib
import gc
import shutil
import weakref

import pytest
import torch
import torch._inductor.config as inductor_config
import torch.nn.functional as F
from torch import profiler
from torch.utils.cpp_extension import get_cxx_compiler

from kernels import decode_attention
from kernels.attention import PackedAttention
from model import generate as generation
from model import kv_cache, lora
from model.generate import Engine, generate
from model.transformer import compiled_halves, rotate
from tests.test_generate import PROMPTS, Recorded, small, some_prompts


def sampled(model, prompts=PROMPTS, new=20, **more):
    options = {"temperature": 1.0, "seeds": range(len(prompts)), "batch_size": 4} | more
    return [(c.tokens, c.logp) for c in generate(model, prompts, new, [3], **options)]


def mixed(**more):
    """fp32 weights that are computed with in bf16: generation needs a copy."""
    return small(dtype=torch.float32, compute_dtype=torch.bfloat16, **more)


def adapted():
    """A policy with adapters that matter; fp64."""
    model = lora.adapt(small(), lora.LoraConfig(rank=4, alpha=8.0), 0, torch.float64)
    with torch.no_grad():
        for layer in lora.adapters(model).values():
            layer.lora_B.weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return model


def train(model):
    """A step that moves every weight."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for number, p in enumerate(trained):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number)).to(p)
    optimizer.step()


# --- the copy of the weights --------------------------------------------------------------


@pytest.fixture
def eager_compile(monkeypatch):
    """torch.compile without a compiler."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="eager"))
    torch._dynamo.reset()
    compiled_halves.cache_clear()
    yield
    torch._dynamo.reset()
    compiled_halves.cache_clear()


def test_no_copy_of_a_compiled_model_outlives_its_generation(eager_compile, monkeypatch):
    """Without waiting for the garbage collector: a GPU's memory would fill up first."""
    made, fuse = [], generation.fuse_products

    def seen(model):
        made.extend(weakref.ref(part) for part in (model, *model.layers))
        return fuse(model)

    monkeypatch.setattr(generation, "fuse_products", seen)
    model = mixed()
    model.compile_blocks()
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            generate(model, PROMPTS, 6, [])
        assert len(made) == 9 and not any(reference() for reference in made)
    finally:
        gc.enable()


GEMMA = dict(
    qk_norm=True,
    qkv_bias=False,
    windows=(5, 0),
    sandwich_norms=True,
    norm_offset=1.0,
    scale_embedding=True,
    activation="gelu_pytorch_tanh",
)


@pytest.mark.parametrize(
    "make", [mixed, adapted, lambda: mixed(qk_norm=True, qkv_bias=False), lambda: mixed(**GEMMA)]
)
def test_weights_are_refreshed_in_place(make):
    model = make()
    engine = Engine(model)
    first = sampled(engine)
    before = {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    train(model)
    second = sampled(engine)
    assert before == {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    assert second == sampled(Engine(model)) != first
    joint, _ = engine.model.layers[0].mlp.fused
    assert joint.data_ptr() == engine.model.layers[0].mlp.gate_proj.weight.data_ptr()


@torch.no_grad()
def test_joined_products_and_merged_adapters_give_the_logits_of_the_model():
    tokens, positions = torch.tensor(PROMPTS[6]), torch.arange(30)
    for model in (adapted(), small(), small(qk_norm=True, qkv_bias=False), small(**GEMMA)):
        want = model(tokens, positions, PackedAttention([30]))
        plain = Engine(model).model
        generation.fuse_products(plain)
        got = plain(tokens, positions, PackedAttention([30]))
        assert (got - want).norm() < 1e-12 * want.norm()
        assert plain.layers[0].mlp.fused and not lora.adapters(plain)
        shared = plain.embed_tokens.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
        assert shared, "what is not adapted is not copied"


def test_a_model_in_its_own_dtype_is_not_copied_on_a_cpu():
    model = small()
    engine = Engine(model)
    want = sampled(engine)
    assert engine.model is model and model.layers[0].self_attn.fused is None
    assert sampled(engine) == want == sampled(model)


# --- the cache ----------------------------------------------------------------------------


def test_a_cache_that_grows_is_never_there_twice(monkeypatch):
    """Layers move one by one, and only rows in use; what was sampled does not change."""
    model, prompts = small(num_layers=6), some_prompts([3, 5, 4, 9, 2, 6])
    caches, peaks, made, pad = [], [], [], F.pad

    def counted(layer, *args):
        grown = pad(layer, *args)
        made.append(weakref.ref(grown))
        alive = {id(held): held.nbytes for held in caches[-1].layers}
        for reference in made:
            held = reference()
            if held is not None:
                alive[id(held)] = held.nbytes
        peaks.append(sum(alive.values()))
        return grown

    class Seen(kv_cache.KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            caches.append(self)

        def grow(self, slots, rows):
            old, shape = self.nbytes, (self.rows, self.slots)
            peaks.clear()
            kept = [weakref.ref(layer) for layer in self.layers]
            super().grow(slots, rows)
            assert not any(reference() is not None for reference in kept)
            layer = max(old, self.nbytes) // len(self.layers)
            assert max(peaks) <= max(old, self.nbytes) + layer
            shapes.append((shape, (self.rows, self.slots)))

    shapes = []
    want = sampled(model, prompts, 500, top_k=20, batch_size=6)
    monkeypatch.setattr(kv_cache.F, "pad", counted)
    monkeypatch.setattr(generation, "KVCache", Seen)
    monkeypatch.setattr(generation, "FIRST_SLOTS", 8)
    assert sampled(model, prompts, 500, top_k=20, batch_size=6) == want
    assert len(shapes) >= 2 and shapes[-1][1][0] < 6, "rows that have ended are not kept"


@pytest.mark.parametrize("records", [False, True])
def test_where_memory_ends_rows_wait_again(records, monkeypatch):
    model, done = small(), []
    prompts = some_prompts([3, 5, 40, 9, 2, 6, 7, 8])
    want = sampled(model, prompts, 700, top_k=20)
    if records:
        monkeypatch.setattr(generation, "uses_graphs", lambda cache: True)
        monkeypatch.setattr(generation, "record", Recorded)
    caches, areas = [], []
    begin, grow = kv_cache.KVCache.__init__, kv_cache.KVCache.grow

    def grown(self, slots, rows):
        grow(self, slots, rows)
        areas.append(self.rows * self.slots)

    def small_memory(device):
        return 2 * 1024 * caches[-1].nbytes / caches[-1].slots / caches[-1].rows - caches[-1].nbytes

    monkeypatch.setattr(
        kv_cache.KVCache, "__init__", lambda self, *args: caches.append(self) or begin(self, *args)
    )
    monkeypatch.setattr(kv_cache.KVCache, "grow", grown)
    monkeypatch.setattr(kv_cache, "free_bytes", small_memory)
    got = sampled(model, prompts, 700, top_k=20, on_done=lambda *about: done.append(about[0]))
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    assert sorted(done) == list(range(8)) and len(caches) == 1
    assert caches[0].rows < 4 and max(len(tokens) for tokens, _ in want) > 300
    assert areas and max(areas) <= 2 * 1024, "no more than memory has room for"


def test_free_memory_counts_what_the_allocator_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 15)
    assert kv_cache.free_bytes(torch.device("cuda")) == 55


def test_a_kept_cache_serves_shorter_longer_and_more_prompts(monkeypatch):
    model = small()
    engine, decoders = Engine(model), set()
    rounds = [(4, PROMPTS[:3]), (2, PROMPTS), (4, some_prompts([90, 200, 7])), (8, PROMPTS)]
    for size, prompts in rounds:
        assert sampled(engine, prompts, batch_size=size) == sampled(model, prompts, batch_size=size)
        decoders.add(engine._decoder)
    assert len(decoders) == 2  # of three rows, and of eight
    monkeypatch.setattr(generation, "KEPT_BYTES", 0)
    assert sampled(engine) == sampled(model) and engine._decoder is None


# --- recorded steps -----------------------------------------------------------------------


def test_a_capture_is_on_its_own_stream_and_frees_nothing(monkeypatch):
    """`torch.cuda.graph` would give unused memory back to the driver, and training ask anew."""
    did = []

    class Stream:
        device = "cuda:0"

        def wait_stream(self, other):
            did.append(f"{name[self]} waits for {name[other]}")

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            did.append(f"begin {pool} {capture_error_mode}")

        def capture_end(self):
            did.append("end")

    current, side = Stream(), Stream()
    name = {current: "current", side: "side"}
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    for freeing in ("graph", "empty_cache", "synchronize"):
        monkeypatch.delattr(torch.cuda, freeing)
    monkeypatch.setattr(generation, "capture_stream", lambda device: side)
    assert isinstance(generation.record(lambda: did.append("run"), "pool"), Graph)
    steps = ["side waits for current", "begin pool thread_local", "run", "end"]
    assert did == [*steps, "current waits for side"]
    with pytest.raises(ZeroDivisionError):
        generation.record(lambda: 1 / 0, "pool")
    assert did[-1] == "end", "a capture that fails is ended, too"


@pytest.mark.parametrize("make", [mixed, adapted])
def test_recorded_steps_are_kept_and_read_the_new_weights(make, monkeypatch):
    monkeypatch.setattr(generation, "uses_graphs", lambda cache: True)
    monkeypatch.setattr(generation, "record", Recorded)
    monkeypatch.setattr(kv_cache, "by_kernel", lambda cache: True)
    Recorded.made, Recorded.replayed = [], 0
    model = make()
    engine = Engine(model)
    first = sampled(engine, new=90)
    recorded = len(Recorded.made)
    assert recorded
    train(model)
    second = sampled(engine, new=90)
    assert len(Recorded.made) == recorded, "recorded again"
    monkeypatch.setattr(generation, "CAPTURE_AFTER", 10**9)
    assert first != second == sampled(Engine(model), new=90)


def test_a_step_reads_the_slots_in_use_and_not_the_whole_cache(monkeypatch):
    """As many programs of the attention kernel would start as the cache has splits."""
    monkeypatch.setattr(generation, "uses_graphs", lambda cache: True)
    monkeypatch.setattr(generation, "record", Recorded)
    monkeypatch.setattr(generation, "SLOTS", 32)
    monkeypatch.setattr(generation, "FIRST_SLOTS", 256)
    monkeypatch.setattr(kv_cache, "by_kernel", lambda cache: True)
    seen, attend = [], kv_cache.decode_attention

    def spy(q, k, v, length_B, *more):
        assert k.shape[2] == v.shape[2] >= length_B.max()
        seen.append(k.shape[2])
        return attend(q, k, v, length_B, *more)

    monkeypatch.setattr(kv_cache, "decode_attention", spy)
    generate(small(), [[1, 2, 3]], 80, [])
    assert seen == sorted(seen) and set(seen) == {32, 64, 83}


def test_steps_wait_for_the_host_once_for_several_tokens(monkeypatch):
    """The host sets the rows only when some end or begin."""
    monkeypatch.setattr(generation, "uses_graphs", lambda cache: True)
    monkeypatch.setattr(generation, "record", Recorded)
    calls = collections.Counter()

    class Counted(generation._Decoder):
        def set(self, state):
            calls["set"] += 1
            return super().set(state)

        def __call__(self, *args):
            calls["run"] += 1
            return super().__call__(*args)

    monkeypatch.setattr(generation, "_Decoder", Counted)
    model, heard = small(), []
    got = generate(
        model,
        PROMPTS,
        42,
        [],
        temperature=1.0,
        seeds=range(10),
        on_token=lambda *a: heard.append(a),
    )
    assert calls["set"] == 1 and calls["run"] == -(-42 // generation.STEPS)
    assert len(heard) == 420 and all(len(c.tokens) == 42 for c in got)


@pytest.mark.slow
def test_a_compiled_layer_launches_few_kernels(monkeypatch):
    """As the CPU's profiler counts them: 42 operations without compilation and joined products.

    The two kernels of a GPU have stand-ins, a launch each.
    """
    stand_ins = collections.Counter()

    def store(q, k, v, rope, kv, slot_B):
        stand_ins["store"] += 1
        row_B = torch.arange(len(q))
        kv[0, row_B, :, slot_B], kv[1, row_B, :, slot_B] = rotate(k, rope), v
        return rotate(q, rope)

    def attend(*args):
        stand_ins["attend"] += 1
        return decode_attention.decode_reference(*args[:5])

    class Rotating(kv_cache.DecodeAttention):
        def __init__(self, *args):
            super().__init__(*args)
            self.by_kernel = self.rotates = True

    monkeypatch.setattr(generation, "DecodeAttention", Rotating)
    monkeypatch.setattr(kv_cache, "rotate_and_store", store)
    monkeypatch.setattr(kv_cache, "decode_attention", attend)
    if not shutil.which(get_cxx_compiler()):
        pytest.skip("no C++ compiler for torch.compile on a CPU")
    torch._dynamo.reset()
    compiled_halves.cache_clear()
    launches = {}
    with inductor_config.patch({"cpp.enable_kernel_profile": True}):
        for layers in (1, 3):
            model = mixed(num_layers=layers)
            model.compile_blocks()
            engine = Engine(model)
            generate(engine, [[1]] * 20, 3, [])
            with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profile:
                stand_ins.clear()
                generate(engine, [[1]] * 20, 1, [])
            ran = {event.key: event.count for event in profile.key_averages()}
            launches[layers] = sum(
                count
                for name, count in ran.items()
                if name in ("aten::mm", "aten::addmm") or name.startswith("graph_")
            )
            assert set(stand_ins.values()) == {layers}
            launches[layers] += stand_ins.total()
    assert 0 < (launches[3] - launches[1]) / 2 <= 9
    torch._dynamo.reset()
    compiled_halves.cache_clear()
