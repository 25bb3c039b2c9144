"""The transformer against `transformers`, checkpoints both ways, and what must be refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_models
from errors import UserError
from kernels.attention import PackedAttention
from model.checkpoint import build_model, locate, read_config, save_model, stop_ids_of
from model.generate import generate
from model.hf import config_from_hf
from model.load import Checkpoint, describe, load_frozen, without_layers
from model.optim import learning_rate
from model.presets import PRESETS
from model.transformer import ModelConfig, Transformer, compiled_halves

transformers = pytest.importorskip("transformers")
SHAPES = {
    "qwen2-tied": (
        "Qwen2",
        dict(
            num_attention_heads=4, num_key_value_heads=2, hidden_size=48, tie_word_embeddings=True
        ),
    ),
    "qwen2-untied": (
        "Qwen2",
        dict(
            num_attention_heads=3, num_key_value_heads=1, hidden_size=48, tie_word_embeddings=False
        ),
    ),
    "qwen3": (
        "Qwen3",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=40,
            head_dim=16,
            tie_word_embeddings=True,
        ),
    ),
    "llama": (
        "Llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            hidden_size=48,
            tie_word_embeddings=True,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        ),
    ),
    "llama-linear": (
        "Llama",
        dict(
            num_attention_heads=3,
            num_key_value_heads=1,
            hidden_size=48,
            tie_word_embeddings=False,
            rope_scaling={"rope_type": "linear", "factor": 4.0},
        ),
    ),
    "gemma3": (
        "Gemma3Text",
        dict(
            num_attention_heads=4,
            num_key_value_heads=1,
            hidden_size=48,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=9,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            rope_local_base_freq=100.0,
            tie_word_embeddings=True,
        ),
    ),
}
CLASSES = {"Gemma3Text": "Gemma3"}  # where the model's name is not the configuration's


def theirs(kind, **more):
    family, shape = SHAPES[kind]
    shape = (
        dict(
            vocab_size=211,
            intermediate_size=80,
            num_hidden_layers=3,
            max_position_embeddings=512,
            rope_theta=1e4,
        )
        | shape
    )
    config = getattr(transformers, f"{family}Config")(
        **shape, eos_token_id=None, bos_token_id=None, pad_token_id=None, **more
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES.get(family, family)}ForCausalLM")(config).eval()
    with torch.no_grad():  # norms and biases away from 1 and 0, so that a forgotten one shows
        for p in model.parameters():
            p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.05))
    return model


def ours(folder):
    return build_model(read_config("", folder), folder, device="cpu", seed=0)


def logits(model, documents):
    lengths = [len(d) for d in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    return model(torch.cat(documents), positions, PackedAttention(lengths)) @ model.head_VD.T


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("shard", ["10GB", "60KB"])
def test_logits_and_greedy_tokens_equal_transformers(kind, shard, tmp_path):
    reference = theirs(kind)
    reference.save_pretrained(tmp_path, max_shard_size=shard)
    model = ours(tmp_path)
    documents = [torch.randint(211, (n,)) for n in (1, 7, 40, 33, 2)]
    with torch.no_grad():
        got = logits(model, documents).split([len(d) for d in documents])
        for d, mine in zip(documents, got, strict=True):
            want = reference(d[None]).logits[0]
            assert (mine - want).norm() / want.norm() < 1e-5
    prompts = [d.tolist() for d in documents]
    for prompt, new in zip(prompts, generate(model, prompts, 60, []), strict=True):
        want = reference.generate(
            torch.tensor([prompt]),
            max_new_tokens=60,
            min_new_tokens=60,
            do_sample=False,
            use_cache=True,
        )
        assert new.tokens == want[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", SHAPES)
def test_a_saved_checkpoint_loads_in_transformers_and_here(kind, tmp_path):
    theirs(kind).save_pretrained(tmp_path / "in")
    model, tokenizer = ours(tmp_path / "in"), toy_models.toy_tokenizer()
    (tmp_path / "out").mkdir()
    sampling = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    save_model(model, tmp_path / "out", tokenizer, [2, 0], sampling)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    document = torch.randint(211, (30,))
    with torch.no_grad():
        mine, want = logits(model, [document]), back(document[None]).logits[0]
    assert (mine - want).norm() / want.norm() < 1e-5
    found = back.generation_config
    assert found.do_sample and found.repetition_penalty == 1.0
    assert {name: getattr(found, name) for name in sampling} == sampling
    assert back.generation_config.eos_token_id == [2, 0] == stop_ids_of(tmp_path / "out")
    again = ours(tmp_path / "out")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    text = "Mia has 12 apples."
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(text)[
        "input_ids"
    ] == tokenizer.encode(text)


def test_a_model_without_some_layers_is_that_of_transformers_without_them(tmp_path):
    reference = theirs("gemma3")
    reference.save_pretrained(tmp_path)
    checkpoint = without_layers(describe(str(tmp_path), "--model", read_tokenizer=False), "0,2-2")
    assert checkpoint.config.windows == (0, 0) and checkpoint.dropped == (0, 2)
    model = load_frozen(checkpoint, torch.device("cpu"), torch.float32, 0)
    reference.model.layers = torch.nn.ModuleList([reference.model.layers[i] for i in (1, 3)])
    reference.config.layer_types = ["full_attention"] * 2
    reference.config.num_hidden_layers = 2
    document = torch.randint(211, (30,))
    with torch.no_grad():
        mine, want = logits(model, [document]), reference(document[None], use_cache=False).logits[0]
    assert (mine - want).norm() / want.norm() < 1e-5


@pytest.mark.parametrize(
    "layers,words",
    [
        ("4", "has the layers 0 to 3"),
        ("2-9", "has the layers 0 to 3"),
        ("3-1", "has the layers 0 to 3"),
        ("0-3", "leaves no layer"),
        ("one", "'one' is no layer"),
        ("1,", "'' is no layer"),
        ("-1", "'-1' is no layer"),
    ],
)
def test_layers_that_cannot_be_dropped(layers, words):
    checkpoint = Checkpoint("here", None, dataclasses.replace(PRESETS["tiny"], num_layers=4), None)
    with pytest.raises(UserError, match=words) as e:
        without_layers(checkpoint, layers)
    assert str(e.value).startswith("--drop_layers") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name,count",
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in Transformer(PRESETS[name]).parameters()) == count


def small(seed=0, **more):
    config = ModelConfig(
        **dict(
            vocab_size=50,
            hidden_size=24,
            intermediate_size=40,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
        )
        | more
    )
    return build_model(config, None, device="cpu", seed=seed, weight_dtype=torch.float64)


def test_documents_do_not_see_each_other():
    model, documents = small(), [torch.randint(50, (n,)) for n in (5, 1, 17, 16, 15, 40, 2, 2)]
    with torch.no_grad():
        together = logits(model, documents).split([len(d) for d in documents])
        for d, got in zip(documents, together, strict=True):
            assert torch.allclose(got, logits(model, [d]), atol=1e-13)
        changed = [*documents[:2], (documents[2] + 1) % 50, *documents[3:]]
        after = logits(model, changed).split([len(d) for d in documents])
    for i, (a, b) in enumerate(zip(together, after, strict=True)):
        assert torch.equal(a, b) == (i != 2)


def test_no_block_mixes_lengths_badly_and_empty_documents_are_nothing():
    lengths = [1, 100, 0, 76, 75, 74, 9, 8, 0, 100]
    attend = PackedAttention(lengths)
    assert sum(len(index) for index, _ in attend.blocks[0]) <= sum(lengths) / 0.75
    q, k = torch.randn(sum(lengths), 4, 8), torch.randn(sum(lengths), 2, 8)
    dense = PackedAttention([n for n in lengths if n])
    assert torch.equal(attend(0, q, k, k), dense(0, q, k, k))
    assert PackedAttention([])(0, q[:0], k[:0], k[:0]).shape == (0, 4, 8)


def test_activation_checkpointing_changes_nothing():
    documents = [torch.randint(50, (n,)) for n in (5, 9)]
    grads = []
    for checkpointing in (False, True):
        model = small()
        model.activation_checkpointing = checkpointing
        logits(model, documents).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_generation_stops_and_does_not_depend_on_the_batch():
    model = small(seed=3)
    prompts = [torch.randint(50, (n,)).tolist() for n in (4, 9, 2, 6, 6, 1, 12)]
    free = [c.tokens for c in generate(model, prompts, 40, [])]
    stops = {free[0][5], free[2][20]}
    for batch_size in (1, 3, 100):
        for got, want in zip(
            generate(model, prompts, 40, stops, batch_size=batch_size), free, strict=True
        ):
            end = next((i + 1 for i, t in enumerate(want) if t in stops), 40)
            assert got.tokens == want[:end] and got.stopped == (want[end - 1] in stops)
    assert all(t < 7 for c in generate(model, prompts, 10, [], vocab=7) for t in c.tokens)


# --- what is refused ----------------------------------------------------------------------


def broken(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change,words",
    [
        (lambda t: t.pop("model.norm.weight"), "model.norm.weight|norm.weight is missing"),
        (lambda t: t.update({"model.extra": torch.ones(1)}), "unexpected tensor model.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"shape \[3\].*\[48\]"),
    ],
)
def test_tensors_that_do_not_fit(change, words, tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    broken(tmp_path, change)
    with pytest.raises(UserError, match=words) as e:
        ours(tmp_path)
    assert "\n" not in str(e.value)


def test_truncated_missing_and_damaged_files(tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) // 2, 20, 4, 0):
        weights.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="model.safetensors: damaged"):
            ours(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        ours(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_config("", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        locate(str(tmp_path), "--model")
    with pytest.raises(UserError, match="no such folder"):
        locate("nowhere", "--model")


@pytest.mark.parametrize(
    "change,words",
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        (
            {
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            "different scalings",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "scaling",
        ),
        ({"use_sliding_window": True, "sliding_window": 64}, "sliding"),
        ({"use_sliding_window": True, "sliding_window": None}, "sliding"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"model_type": "olmo2"}, "olmo2"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": None}, "hidden_size"),
    ],
)
def test_configurations_that_would_be_computed_wrongly(change, words, tmp_path):
    hf = json.loads(theirs("qwen2-tied").config.to_json_string()) | change
    hf = {k: v for k, v in hf.items() if v is not None}
    if "rope_scaling" in change and "rope_parameters" not in change:
        hf.pop("rope_parameters", None)
    with pytest.raises(UserError, match=words):
        config_from_hf(hf, "here")


def test_schedules():
    def rate(step, schedule):
        return learning_rate(step, 100, 2.0, 10, schedule, 0.1)

    assert [rate(0, s) for s in ("constant", "linear", "cosine")] == [0.2] * 3
    assert rate(9, "cosine") == 2.0 == rate(50, "constant")
    assert rate(99, "linear") == rate(99, "cosine") == pytest.approx(0.2)
    assert rate(10, "cosine") == 2.0 and rate(54, "linear") == pytest.approx(
        2 * (0.1 + 0.9 * 45 / 89)
    )
    assert learning_rate(0, 1, 2.0, 0, "cosine", 0.1) == 2.0


def test_compiled_halves_serve_all_layers_after_an_evaluation(monkeypatch):
    """Twelve layers share few graphs, and packs of many sizes do not use up the recompile limit."""
    compiled, calls = [], []

    def counting(graph, inputs):
        compiled.append(graph)
        return lambda *args: calls.append(1) or graph(*args)

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: torch_compile(f, backend=counting))
    torch._dynamo.reset()
    compiled_halves.cache_clear()
    shape = dataclasses.replace(PRESETS["tiny"], num_layers=12)
    plain, model = (Transformer(shape).init_weights(0) for _ in range(2))
    model.compile_blocks()

    def forward(m, lengths):
        positions = torch.cat([torch.arange(n) for n in lengths])
        return m(positions % 7 + 1, positions, PackedAttention(lengths))

    with torch.no_grad():
        for lengths in ([5], [9, 3], [17, 2, 2], [30], [31, 8]):
            forward(model, lengths)
        generate(model, [[1, 2, 3], [4]], 12, [0], vocab=50)
    calls.clear()
    for lengths in ([6, 7], [40, 3], [11]):
        torch.testing.assert_close(forward(model, lengths), forward(plain, lengths))
    assert len(calls) == 3 * 24 and len(compiled) <= 16
    torch._dynamo.reset()
    compiled_halves.cache_clear()
