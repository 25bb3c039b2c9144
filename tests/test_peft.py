"""LoRA beside PEFT: outputs, gradients and files both ways; adapters that are refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from errors import UserError
from model import lora
from model.checkpoint import (
    build_model,
    load_adapter,
    locate,
    read_adapter,
    read_config,
    save_adapter,
    save_model,
)
from model.presets import PRESETS
from tests.test_lora import CONFIG, adapted, saved, shaken
from tests.test_model import SHAPES, logits, theirs


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("kind", SHAPES)
def test_outputs_gradients_and_files_equal_those_of_peft_both_ways(kind, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    theirs(kind).double().save_pretrained(tmp_path / "base")
    stated = dict(
        r=3,
        lora_alpha=7,
        target_modules=list(CONFIG.targets),
        use_rslora=rslora,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(5)
    reference = peft.get_peft_model(theirs(kind).double(), peft.LoraConfig(**stated)).double()
    reference.save_pretrained(tmp_path / "theirs")

    base = build_model(
        read_config("", tmp_path / "base"),
        tmp_path / "base",
        device="cpu",
        seed=0,
        weight_dtype=torch.float64,
    )
    config, _ = read_adapter(tmp_path / "theirs")
    assert (config.rank, config.alpha, config.rslora, config.targets) == (
        3,
        7,
        rslora,
        CONFIG.targets,
    )
    mine = load_adapter(lora.adapt(base, config, 0, torch.float64), tmp_path / "theirs")
    document, weights = torch.randint(211, (30,)), torch.randn(30, 211, dtype=torch.float64)

    def backward(model, output, weights):
        model.zero_grad()
        (output * weights).sum().backward()
        named = (
            (n.removeprefix(lora.PREFIX).replace(".default", ""), p)
            for n, p in model.named_parameters()
        )
        return {n: p.grad for n, p in named if p.grad is not None}

    def compare(ours, other):
        """Each layer to fp64; the whole model as far as norms and positions in fp32 allow."""
        whole = logits(ours, [document]), other(document[None]).logits[0]
        pairs = [(whole, weights, 1e-5)]
        for name, layer in lora.adapters(ours).items():
            x = torch.randn(9, layer.in_features, dtype=torch.float64)
            pairs.append(
                (
                    (layer(x), other.get_submodule(lora.PREFIX + name)(x)),
                    torch.randn(9, layer.out_features),
                    1e-13,
                )
            )
        for (got, want), weigh, tolerance in pairs:
            assert (got - want).norm() < tolerance * want.norm()
            a, b = backward(ours, got, weigh), backward(other, want, weigh)
            assert a.keys() == b.keys() and len(a) == (
                2 * 5 * len(ours.layers) if want is whole[1] else 2
            )
            for name, grad in a.items():
                assert (grad - b[name]).norm() < tolerance * b[name].norm() and grad.any(), name

    compare(mine, reference)
    plain = theirs(kind).double()(document[None]).logits[0]
    assert (
        logits(mine, [document]) - plain
    ).norm() / plain.norm() > 1e-2  # the adapters do something
    assert (logits(base, [document]) - plain).norm() / plain.norm() < 1e-6  # the base is left alone

    shaken(mine)
    save_adapter(mine, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(
        theirs(kind).double(), tmp_path / "ours", is_trainable=True, autocast_adapter_dtype=False
    )
    compare(mine, back)
    a, b = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs"))
    assert a.keys() == b.keys() and all(
        a[k].shape == b[k].shape and a[k].dtype == b[k].dtype for k in a
    )
    stated, known = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    )
    assert stated.keys() <= known.keys() and set(stated.pop("target_modules")) == set(
        known["target_modules"]
    )
    assert {k for k, v in stated.items() if known[k] != v} == {"init_lora_weights"}


def test_a_peft_folder_is_loaded_merged_wherever_a_model_is_named(tmp_path):
    peft = pytest.importorskip("peft")
    theirs("qwen2-tied").save_pretrained(tmp_path / "base")
    model = theirs("qwen2-tied")
    model.config._name_or_path = model.name_or_path = str(tmp_path / "base")
    projections = r".*layers\.[02]\..*_proj"  # a pattern, and not every layer
    reference = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=projections, init_lora_weights=False)
    )
    reference.save_pretrained(tmp_path / "adapter")
    merged = reference.merge_and_unload()
    folder = locate(str(tmp_path / "adapter"), "--model")
    got = build_model(read_config("", folder), folder, device="cpu", seed=0)
    assert len(read_adapter(folder)[1]) == 2 * 7
    for name, p in got.named_parameters():
        assert torch.allclose(p, merged.get_parameter(f"model.{name}"), atol=1e-6), name


# --- what is refused ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base, model = adapted(vocab_size=600)
    saved(base, folder / "base")
    save_adapter(model, folder / "adapter")
    return folder


def rewritten(source, tmp_path, settings=(), tensors=()):
    (tmp_path / "x").mkdir()
    stated = (
        json.loads((source / "adapter/adapter_config.json").read_text())
        | {"base_model_name_or_path": str(source / "base")}
        | dict(settings)
    )
    (tmp_path / "x/adapter_config.json").write_text(json.dumps(stated))
    held = load_file(source / "adapter/adapter_model.safetensors") | dict(tensors)
    save_file(
        {k: v for k, v in held.items() if v is not None}, tmp_path / "x/adapter_model.safetensors"
    )
    return tmp_path / "x"


FIRST, SEVENTH = (f"{lora.PREFIX}layers.{n}.self_attn.q_proj.lora_A.weight" for n in (0, 7))


@pytest.mark.parametrize(
    "settings,tensors,words",
    [
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3'"),
        ({"peft_type": None}, {}, "peft_type None"),
        ({"use_dora": True}, {}, "use_dora is not supported"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save"),
        ({"bias": "all"}, {}, "bias 'all'"),
        ({"rank_pattern": {"q_proj": 2}}, {}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, {}, "alpha_pattern"),
        ({"fan_in_fan_out": True}, {}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa_niter_16"}, {}, "pissa_niter_16"),
        ({"r": 8}, {}, "adapter_config.json says r 8"),
        ({"r": None}, {}, "has no 'r'"),
        ({"lora_alpha": "x"}, {}, "lora_alpha 'x', which is not a number"),
        (
            {"base_model_name_or_path": "gone/away/x"},
            {},
            "base_model_name_or_path gone/away/x: no such folder",
        ),
        ({"base_model_name_or_path": None}, {}, "no base_model_name_or_path"),
        ({"base_model_name_or_path": "tiny"}, {}, "is a preset"),
        (
            {},
            {lora.PREFIX + "embed_tokens.lora_embedding_A": torch.ones(1, 3)},
            "lora_embedding_A is not supported",
        ),
        (
            {},
            {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 24)},
            "lm_head.lora_A.weight is not supported",
        ),
        (
            {},
            {lora.PREFIX + "embed_tokens.lora_A.weight": torch.ones(3, 24)},
            "embed_tokens.lora_A.weight is not supported",
        ),
        (
            {},
            {FIRST.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32)},
            "magnitude_vector is not supported",
        ),
        ({}, {FIRST: None}, "incomplete"),
        ({}, {FIRST: torch.ones(3, 25)}, "is for a layer of 32 x 25, not 32 x 24"),
        (
            {},
            {SEVENTH: torch.ones(3, 24), SEVENTH.replace("_A", "_B"): torch.ones(32, 3)},
            "layer layers.7.self_attn.q_proj that its base has not",
        ),
    ],
)
def test_adapters_that_would_be_computed_wrongly_are_one_line(
    settings, tensors, words, adapter, tmp_path
):
    folder = rewritten(adapter, tmp_path, settings, tensors)
    with pytest.raises(UserError) as e:
        name = locate(str(folder), "--model")
        assert tensors or settings == {
            "r": 8
        }  # what the settings alone say is refused before anything is read
        build_model(read_config("", name), name, device="cpu", seed=0)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_missing_damaged_and_misplaced_adapters(adapter, tmp_path):
    folder = rewritten(adapter, tmp_path)

    def load():
        config = read_config("", locate(str(folder), "--model"))
        return build_model(config, folder, device="cpu", seed=0, weight_dtype=torch.float64)

    want = load()
    (tmp_path / "two").mkdir()
    twice = rewritten(adapter, tmp_path / "two", {"base_model_name_or_path": str(folder)})
    with pytest.raises(UserError, match="an adapter itself"):
        locate(str(twice), "--model")
    weights = folder / "adapter_model.safetensors"
    for cut in (len(weights.read_bytes()) // 2, 3):
        weights.write_bytes(weights.read_bytes()[:cut])
        with pytest.raises(UserError, match="adapter_model.safetensors: damaged"):
            load()
    weights.unlink()
    with pytest.raises(UserError, match="has no adapter_model.safetensors"):
        load()
    (tmp_path / "three").mkdir()
    folder = rewritten(adapter, tmp_path / "three", {"base_model_name_or_path": None})
    for file in ("config.json", "model.safetensors"):  # the base beside its adapter
        (folder / file).write_bytes((adapter / "base" / file).read_bytes())
    for name in (None, "", str(adapter / "base"), str(folder)):
        (folder / "adapter_config.json").write_text(
            json.dumps(
                json.loads((folder / "adapter_config.json").read_text())
                | {"base_model_name_or_path": name}
            )
        )
        got = load()
        assert all(
            torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True)
        )


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "/home/somebody/base"])
def test_an_adapter_beside_its_merged_model_is_not_merged_again(name, adapter, tmp_path):
    """PEFT's `merge_and_unload` saved into the adapter's folder, whose base was elsewhere."""
    folder = rewritten(adapter, tmp_path, {"base_model_name_or_path": name})
    (tmp_path / "whole").mkdir()
    whole = rewritten(adapter, tmp_path / "whole")
    merged = build_model(read_config("", whole), whole, device="cpu", seed=0)
    save_model(merged, folder, SimpleNamespace(save=str), [0])
    for load in (lambda: locate(str(folder), "--model"), lambda: read_config("", folder)):
        with pytest.raises(
            UserError,
            match=f"names the base {name}, .* delete adapter_config.json if .* "
            'or make base_model_name_or_path ""',
        ) as e:
            load()
        assert "\n" not in str(e.value)
    (folder / "adapter_config.json").unlink()
    got = build_model(read_config("", folder), folder, device="cpu", seed=0)
    assert all(
        torch.equal(a, b) for a, b in zip(got.parameters(), merged.parameters(), strict=True)
    )


def test_a_config_beside_an_adapter_is_no_base(adapter, tmp_path):
    """Some trainers leave the base's config.json with the adapter: the base is the one named."""
    folder = rewritten(adapter, tmp_path)
    want = build_model(read_config("", folder), folder, device="cpu", seed=0)
    (folder / "config.json").write_bytes((adapter / "base/config.json").read_bytes())
    got = build_model(read_config("", locate(str(folder), "--model")), folder, device="cpu", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))
    settings = json.loads((folder / "adapter_config.json").read_text()) | {
        "base_model_name_or_path": "gone/away/x"
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="base_model_name_or_path gone/away/x: no such folder"):
        locate(str(folder), "--model")


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: "_orig_mod." + k,
        lambda k: "module." + k,
        lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    ],
    ids=["state dict", "compile", "ddp", "compiled inside"],
)
def test_an_adapter_saved_from_a_wrapped_model_is_the_same(rename, tmp_path):
    base = build_model(PRESETS["mini"], None, device="cpu", seed=0)
    save_adapter(lora.adapt(base, lora.LoraConfig(2, 4.0), 1), tmp_path / "a")
    want = read_adapter(tmp_path / "a")[1]
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    save_file({rename(key): tensor for key, tensor in tensors.items()}, file)
    got = read_adapter(tmp_path / "a")[1]
    assert got.keys() == want.keys() and all(
        torch.equal(a, b) for key in want for a, b in zip(got[key], want[key], strict=True)
    )
    save_file({key: tensor.to(torch.int8) for key, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match="lora_A.weight is I8"):
        read_adapter(tmp_path / "a")
