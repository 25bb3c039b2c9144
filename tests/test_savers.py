"""Checkpoints as savers leave them: loaded as `transformers` loads them, or refused by name."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import toy_models
import train
from errors import UserError
from model.checkpoint import load_weights, read_config, save_model, stop_ids_of
from model.hf import config_from_hf, config_to_hf
from model.presets import PRESETS
from tests.test_model import logits, ours, theirs

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@pytest.fixture(params=["one file", "shards"])
def tied(request, tmp_path):
    """A tied checkpoint, and a function that changes its tensors."""
    size = "10GB" if request.param == "one file" else "60KB"
    theirs("qwen2-tied").save_pretrained(tmp_path, max_shard_size=size)

    def change(edit):
        parts = sorted(tmp_path.glob("*.safetensors"))
        assert len(parts) == 1 or size == "60KB"
        where = {key: part for part in parts for key in load_file(part)}
        tensors = {key: tensor for part in parts for key, tensor in load_file(part).items()}
        tensors = edit(dict(tensors)) or tensors
        for part in parts:
            kept = {
                key: t.contiguous().clone()
                for key, t in tensors.items()
                if where.get(key, parts[-1]) == part
            }
            save_file(kept, part, metadata={"format": "pt"})
            where |= dict.fromkeys(kept, part)
        if len(parts) > 1:
            index = {"metadata": {}, "weight_map": {key: where[key].name for key in tensors}}
            (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))

    return tmp_path, change


def agrees(folder):
    """Whether our logits are those of `transformers`, to fp32's precision."""
    ids = torch.randint(211, (33,))
    with torch.no_grad():
        mine = logits(ours(folder), [ids])
        want = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(
            ids[None]
        ).logits[0]
    return bool((mine - want).norm() / want.norm() < 1e-5)


def with_head(tensors, noise):
    return tensors | {HEAD: tensors[EMBEDDING] + noise * torch.randn_like(tensors[EMBEDDING])}


def test_another_head_beside_a_tied_config_is_used_exported_and_told_once(tied, tmp_path, capsys):

    folder, change = tied
    change(lambda t: with_head(t, 0.1))
    assert agrees(folder)
    model = ours(folder)
    assert not model.config.tie_word_embeddings and not torch.equal(
        model.head_VD, model.embed_tokens.weight
    )
    told = [line for line in capsys.readouterr().out.splitlines() if "untied" in line]
    assert len(told) == 1 and str(folder) in told[0] and HEAD in told[0]
    (tmp_path / "out").mkdir()
    save_model(model, tmp_path / "out", toy_models.toy_tokenizer(), [2])
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(ours(tmp_path / "out").head_VD, model.head_VD) and agrees(tmp_path / "out")


def test_other_ranks_do_not_tell_of_the_head(tmp_path, capsys, monkeypatch):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    save_file(
        with_head(load_file(tmp_path / "model.safetensors"), 0.1),
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    for name, value in dict(
        WORLD_SIZE="2", RANK="1", MASTER_ADDR="localhost", MASTER_PORT="1"
    ).items():
        monkeypatch.setenv(name, value)
    assert (
        not read_config("", tmp_path).tie_word_embeddings
        and "untied" not in capsys.readouterr().out
    )


def test_a_changed_file_is_looked_at_again(tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for noise in (0.0, 0.1):
        save_file(
            with_head(tensors, noise), tmp_path / "model.safetensors", metadata={"format": "pt"}
        )
        assert read_config("", tmp_path).tie_word_embeddings == (noise == 0)


def test_an_equal_head_and_a_head_alone_stay_tied(tied, capsys):
    folder, change = tied
    change(lambda t: with_head(t, 0.0))
    assert agrees(folder) and ours(folder).config.tie_word_embeddings
    change(
        lambda t: {HEAD: t[EMBEDDING]} | {k: v for k, v in t.items() if k not in (HEAD, EMBEDDING)}
    )
    assert agrees(folder) and ours(folder).config.tie_word_embeddings
    change(lambda t: {k: v for k, v in t.items() if k != HEAD})
    with pytest.raises(UserError, match="embed_tokens.weight is missing"):
        ours(folder)
    assert "untied" not in capsys.readouterr().out


def test_an_untied_checkpoint_without_its_head_is_refused(tmp_path):
    theirs("qwen2-untied").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != HEAD},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match="lm_head.weight is missing.*not tied"):
        ours(tmp_path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: "_orig_mod." + k,
        lambda k: "module." + k,
        lambda k: "module._orig_mod." + k,
        lambda k: "base_model.model." + k,
        lambda k: k.replace("layers.1.", "layers.1._orig_mod."),
        lambda k: k.replace(".mlp.", "._checkpoint_wrapped_module.mlp._fsdp_wrapped_module."),
        lambda k: k.removeprefix("model."),
        lambda k: "model." + k,
    ],
    ids=["compile", "ddp", "both", "peft", "compiled blocks", "fsdp", "none", "doubled"],
)
def test_names_with_what_savers_put_before_them(tied, rename):
    folder, change = tied
    before = ours(folder).state_dict()
    change(lambda t: {rename(key): tensor for key, tensor in t.items()})
    after = ours(folder).state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )


@pytest.mark.parametrize(
    "more,words",
    [
        (
            {"_orig_mod.model.norm.weight": torch.ones(48)},
            r"_orig_mod.model.norm.weight.* norm.weight|norm.weight and _orig_mod",
        ),
        ({"norm.weight": torch.ones(48)}, "are both norm.weight"),
        ({"model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 48)}, "lora.*merge"),
        (
            {"base_model.model.model.layers.0.mlp.up_proj.base_layer.weight": torch.ones(80, 48)},
            "base_layer.*merge",
        ),
        ({"score.weight": torch.ones(1, 48)}, "unexpected tensor score.weight"),
        ({"lm_head.bias": torch.ones(211)}, "unexpected tensor lm_head.bias"),
    ],
)
def test_tensors_that_could_be_two_things_are_refused(tied, more, words):
    folder, change = tied
    change(lambda t: t | more)
    with pytest.raises(UserError, match=words) as e:
        ours(folder)
    assert "\n" not in str(e.value)


QUANTISED = {  # what PyTorch and what the files call them
    "int8": "I8",
    "uint8": "U8",
    "int64": "I64",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused_by_name(tied, kind):
    folder, change = tied
    name = "model.layers.1.mlp.up_proj.weight"
    change(lambda t: t | {name: t[name].to(getattr(torch, kind))})
    with pytest.raises(UserError, match=f"{name} is {QUANTISED[kind]}"):
        ours(folder)


def test_a_quantised_head_beside_a_tied_config_is_refused_by_name(tied):
    folder, change = tied
    change(lambda t: t | {HEAD: t[EMBEDDING].to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match="lm_head.weight is F8_E4M3"):
        ours(folder)


def test_mixed_precisions_are_cast_as_transformers_casts_them(tied):
    folder, change = tied
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    change(lambda t: {key: tensor.to(dtypes[i % 4]) for i, (key, tensor) in enumerate(t.items())})
    assert agrees(folder) and {p.dtype for p in ours(folder).parameters()} == {torch.float32}


# --- the index ----------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path, max_shard_size="60KB")
    path = tmp_path / "model.safetensors.index.json"
    return tmp_path, path, json.loads(path.read_text())


@pytest.mark.parametrize(
    "value", [None, [], {}, "model.safetensors", {NORM: None}, {NORM: 3}, {NORM: ["a.safetensors"]}]
)
def test_an_index_without_a_map(shards, value):
    folder, path, index = shards
    path.write_text(json.dumps(index | {"weight_map": value}))
    with pytest.raises(UserError, match="index.json: ") as e:
        ours(folder)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "place",
    ["../other/{}", "/etc/{}", "sub/{}", "./{}", "{}/", "..", "", "model.bin", "{}\\..\\x.bin"],
)
def test_an_index_that_leads_elsewhere(shards, place, tmp_path):
    folder, path, index = shards
    file = index["weight_map"][NORM]
    path.write_text(
        json.dumps(index | {"weight_map": index["weight_map"] | {NORM: place.format(file)}})
    )
    with pytest.raises(UserError, match="must be a .safetensors file of this folder"):
        ours(folder)


def test_an_index_that_does_not_fit_its_shards(shards):
    folder, path, index = shards
    file = index["weight_map"][NORM]
    path.write_text(json.dumps(index | {"weight_map": index["weight_map"] | {"model.extra": file}}))
    with pytest.raises(UserError, match=f"{file} has no tensor model.extra"):
        ours(folder)
    path.write_text(json.dumps(index))
    (folder / file).rename(folder / "away")
    with pytest.raises(UserError, match=f"no {file}, which the index names"):
        ours(folder)
    (folder / file).symlink_to("../blobs/none")
    with pytest.raises(UserError, match=f"{file} is a link to ../blobs/none"):
        ours(folder)
    (folder / file).unlink()
    path.unlink()
    with pytest.raises(
        UserError, match="no model.safetensors; it has model-.*index.json.* is missing"
    ):
        ours(folder)


def test_stray_files_do_not_count(shards):
    folder, path, index = shards
    before = ours(folder).state_dict()
    save_file(
        {"model.strange": torch.ones(1), NORM: torch.ones(48)}, folder / "optimizer.safetensors"
    )
    (folder / "consolidated.safetensors").write_bytes(b"")
    after = ours(folder).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("place", [0, -1])
def test_a_tensor_in_two_shards_is_refused_by_name(shards, place):
    """transformers takes the one of the file that it reads last, whatever the index says."""
    folder, path, index = shards
    other = [
        f for f in sorted(set(index["weight_map"].values())) if f != index["weight_map"][NORM]
    ][place]
    save_file(
        load_file(folder / other) | {NORM: torch.full((48,), 7.0)},
        folder / other,
        metadata={"format": "pt"},
    )
    with pytest.raises(
        UserError,
        match=f"tensor {NORM} is in two files, model-.*safetensors and model-.*safetensors; ",
    ) as e:
        ours(folder)
    assert (
        other in str(e.value)
        and index["weight_map"][NORM] in str(e.value)
        and "\n" not in str(e.value)
    )
    file = index["weight_map"][NORM]
    without = {key: tensor for key, tensor in load_file(folder / file).items() if key != NORM}
    save_file(without, folder / file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=f"{file} has no tensor {NORM}, which the index says is there"
    ):
        ours(folder)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen2-untied", "gemma3"])
@pytest.mark.parametrize("size", ["5KB", "20KB", "60KB"])
def test_shards_as_transformers_saves_them_hold_no_tensor_twice(family, size, tmp_path):
    """Whatever their size, tied or not, and saved over an older saving in as many files."""
    model = theirs(family)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert agrees(tmp_path)


def test_one_file_comes_before_a_stale_index_as_in_transformers(shards):
    folder, path, index = shards
    tensors = {
        key: tensor
        for file in set(index["weight_map"].values())
        for key, tensor in load_file(folder / file).items()
    }
    save_file(
        {key: 1.5 * tensor for key, tensor in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert torch.equal(ours(folder).norm.weight, 1.5 * tensors[NORM]) and agrees(folder)
    path.write_text("{}")
    assert torch.equal(ours(folder).norm.weight, 1.5 * tensors[NORM])


# --- config.json --------------------------------------------------------------------------

FORMS = [
    {"rope_theta": 5e5},
    {"rope_theta": 500000},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    {"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 7.0},
    {"rope_scaling": {"type": "default", "rope_theta": 5e5}},
    {"rope_scaling": {"rope_type": "default"}, "rope_theta": 5e5},
    {"rope_scaling": None, "rope_theta": 5e5},
    {"rope_scaling": {}, "rope_theta": 5e5},
]


@pytest.mark.parametrize("form", FORMS, ids=json.dumps)
def test_rotary_frequencies_wherever_they_are_written(form, tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    for name in ("rope_parameters", "rope_scaling", "rope_theta"):
        hf.pop(name, None)
    (tmp_path / "config.json").write_text(json.dumps(hf | form))
    assert read_config("", tmp_path).rope_theta == 5e5
    assert agrees(tmp_path)


def test_rotary_frequencies_by_the_type_of_a_layer():
    """As newer configurations of other families have them; every layer here is of the one type."""
    hf = json.loads(theirs("qwen2-tied").config.to_json_string())
    nested = {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5e5},
            "sliding_attention": None,
        }
    }
    assert config_from_hf(hf | nested, "here").rope_theta == 5e5


def test_no_theta_at_all_is_the_default_of_transformers(tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({k: v for k, v in hf.items() if not k.startswith("rope")})
    )
    assert read_config("", tmp_path).rope_theta == 10000.0 and agrees(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "num_key_value_heads",
        "rope_scaling",
        "sliding_window",
        "layer_types",
        "eos_token_id",
        "torch_dtype",
        "dtype",
        "quantization_config",
        "max_window_layers",
    ],
)
def test_nulls_mean_what_they_mean_to_transformers(name, tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text())
    if name == "num_key_value_heads":  # as many as there are query heads
        config = transformers.Qwen2Config(**{k: v for k, v in hf.items() if k != name} | {name: 4})
        transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
        hf = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hf | {name: None}))
    if name == "max_window_layers":  # nothing to us, a refusal there
        assert read_config("", tmp_path)
    else:
        assert agrees(tmp_path)


OLD_GEMMA = {
    "layer_types": None,
    "sliding_window_pattern": 2,
    "rope_parameters": None,
    "rope_theta": 5e5,
    "rope_local_base_freq": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        OLD_GEMMA,
        OLD_GEMMA | {"rope_theta": None, "rope_scaling": None, "rope_local_base_freq": None},
        {"tie_word_embeddings": None, "hidden_activation": None, "attention_bias": None},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 7e4}}},
    ],
)
def test_the_forms_of_gemmas_configuration(change, tmp_path):
    """Version 4 of `transformers` wrote a pattern and two bases, version 5 kinds of layers."""
    theirs("gemma3").save_pretrained(tmp_path)
    hf = json.loads((tmp_path / "config.json").read_text()) | change
    hf = {key: value for key, value in hf.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    assert agrees(tmp_path)


def check_refused(kind, change, words):
    """The configuration of a family with a change gives one line that says where and what."""
    hf = json.loads(theirs(kind).config.to_json_string()) | change
    with pytest.raises(UserError, match=words) as e:
        config_from_hf(hf, "here")
    assert str(e.value).startswith("here: ") and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64 with head_dim 32"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ({"layer_types": ["sliding_attention", "chunked_attention"] * 2}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"]}, "1 layer_types with num_hidden_layers 4"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters for all kinds"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}},
            "rope scaling of sliding_attention",
        ),
        ({"model_type": "gemma3"}, "model_type 'gemma3'"),
        ({"model_type": "gemma2"}, "model_type 'gemma2'"),
        ({"sliding_window": "wide"}, "sliding_window 'wide'"),
    ],
)
def test_what_gemma_may_not_have(change, words):
    check_refused("gemma3", change, words)


@pytest.mark.parametrize(
    "change,words",
    [
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "no 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "no 'factor'"),
    ],
)
def test_what_llama_may_not_have(change, words):
    check_refused("llama", change, words)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_their_config_json(name):
    config = PRESETS[name]
    assert config_from_hf(config_to_hf(config, 0, "float32"), "here") == config


@pytest.mark.parametrize(
    "name",
    [
        "head_dim",
        "rope_theta",
        "rope_parameters",
        "rms_norm_eps",
        "max_position_embeddings",
        "hidden_act",
        "attention_bias",
        "tie_word_embeddings",
    ],
)
def test_a_null_is_a_value_that_is_not_set(name):
    hf = json.loads(theirs("qwen3").config.to_json_string())
    rest = {k: v for k, v in hf.items() if k != name}
    assert config_from_hf(rest | {name: None}, "here") == config_from_hf(rest, "here")


@pytest.mark.parametrize(
    "change,words",
    [
        ({"hidden_size": "48"}, "hidden_size '48'"),
        ({"hidden_size": 48.5}, "whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0"),
        ({"vocab_size": -1}, "vocab_size -1"),
        ({"vocab_size": True}, "vocab_size True"),
        ({"num_attention_heads": None}, "no 'num_attention_heads'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"rope_theta": float("nan"), "rope_parameters": None}, "rope_theta nan"),
        ({"rope_theta": "1e6", "rope_parameters": None}, "rope_theta '1e6'"),
        ({"rope_parameters": [1]}, r"rope_parameters \[1\]"),
        (
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 1e6}},
            "different rope_theta",
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_theta": 1e4},
                    "full_attention": {"rope_theta": 1e6},
                }
            },
            "sliding_attention",
        ),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
        (
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "sliding_attention",
        ),
        ({"layer_types": 3}, "layer_types 3"),
        ({"quantization_config": "awq"}, "awq"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps 'small'"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps inf"),
    ],
)
def test_values_that_are_none(change, words):
    check_refused("qwen2-tied", change, words)


@pytest.mark.parametrize(
    "value,ids", [(None, []), ([None], []), ([], []), (5, [5]), ([5, None, 0], [5, 0])]
)
def test_end_of_sequence_ids_with_nulls(value, ids, tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert stop_ids_of(tmp_path) == ids


@pytest.mark.parametrize("value", ["2", True, [2, "3"], [[2]], 1.5])
def test_end_of_sequence_ids_that_are_none(value, tmp_path):
    theirs("qwen2-tied").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match="generation_config.json: eos_token_id"):
        stop_ids_of(tmp_path)


def test_weights_are_loaded_only_after_all_headers_fit(tmp_path):
    """The tensors' names are found wrong before one of them is copied."""
    theirs("qwen2-tied").save_pretrained(tmp_path)
    model = ours(tmp_path)
    before = model.norm.weight.clone()
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v + 1 for k, v in tensors.items()} | {"norm.weight": tensors[NORM]},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(UserError, match="are both norm.weight"):
        load_weights(model, tmp_path)
    assert torch.equal(model.norm.weight, before)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "adapter_config.json",
    ],
)
def test_a_link_that_leads_nowhere_is_not_passed_over(name, tmp_path):
    """As in a hub cache whose blobs were cleaned away: a file would be lost in silence."""
    from model.load import find

    theirs("qwen2-tied").save_pretrained(tmp_path / "in")
    (tmp_path / "ck").mkdir()
    save_model(ours(tmp_path / "in"), tmp_path / "ck", toy_models.toy_tokenizer(), [2])
    (tmp_path / "ck" / name).unlink(missing_ok=True)
    (tmp_path / "ck" / name).symlink_to("../../blobs/0a1b")
    with pytest.raises(
        UserError, match=rf"{name}\S* is a link to ../../blobs/0a1b, which is not there"
    ) as e:
        find(str(tmp_path / "ck"))
    assert "\n" not in str(e.value)


def test_weights_are_looked_at_before_anything_is_loaded_or_made(tmp_path, capsys):
    """Whether tied or not: a run whose weights are not there leaves no folder behind."""

    (tmp_path / "ck").mkdir()
    theirs("qwen2-untied").save_pretrained(tmp_path / "in")
    save_model(ours(tmp_path / "in"), tmp_path / "ck", toy_models.toy_tokenizer(), [2])
    (tmp_path / "ck/model.safetensors").write_text("Entry not found")
    capsys.readouterr()

    assert (
        train.main(
            [
                "--mode=sft",
                f"--model={tmp_path / 'ck'}",
                "--device=cpu",
                f"--runs={tmp_path / 'runs'}",
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert (
        "model.safetensors" in err
        and "Entry not found" in err
        and err.count("\n") == 1
        and not (tmp_path / "runs").exists()
    )
