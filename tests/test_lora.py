"""LoRA: layers, one copy of the base, the reference policy, runs that are cut, bad options.

Beside PEFT: test_peft.py.
"""

import functools
import gc
import json
import random

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import toy_models
import train
from data.batch import WEIGHTINGS, Document
from eval import __main__ as evaluation
from kernels.attention import PackedAttention
from losses.sft import sft_loss
from model import lora, parallel
from model.checkpoint import build_model, save_model
from model.flops import step_flops
from model.generate import generate
from model.load import find
from model.optim import build_optimizer
from run import RunFolder, run_of
from tests import distributed_workers as workers
from tests.test_model import logits, small
from tests.test_train import SMALL, timeless

CONFIG = lora.LoraConfig(
    rank=3, alpha=7.0, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(train, "draw_curves", lambda folder: None)


def shaken(model):
    """Adapters away from B = 0, so that they do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora.adapters(model).values():
            layer.lora_B.weight.copy_(
                torch.randn(layer.lora_B.weight.shape, generator=generator) * 0.1
            )
    return model


def adapted(config=CONFIG, **more):
    base = small(**more)
    return base, shaken(lora.adapt(base, config, 0, torch.float64))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def saved(model, folder):
    """A checkpoint of the model, with the embedded tokenizer."""
    folder.mkdir(parents=True)
    save_model(model, folder, toy_models.toy_tokenizer(), [2, 0])
    return folder


# --- the layers ---------------------------------------------------------------------------


def test_a_layer_computes_what_the_papers_say():
    for rslora, scale in ((False, 7 / 4), (True, 7 / 2)):
        _, model = adapted(lora.LoraConfig(rank=4, alpha=7.0, rslora=rslora))
        assert len(lora.adapters(model)) == 2 * 7
        layer, x = model.layers[1].self_attn.q_proj, torch.randn(5, 24, dtype=torch.float64)
        want = (
            x @ layer.weight.T
            + layer.bias
            + scale * (x @ layer.lora_A.weight.T) @ layer.lora_B.weight.T
        )
        assert torch.allclose(layer(x), want, atol=1e-13, rtol=0)


def test_fresh_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    base = small()
    model, again, other = (lora.adapt(base, CONFIG, seed, torch.float64) for seed in (3, 3, 4))
    documents = [torch.randint(50, (n,)) for n in (5, 9)]
    assert torch.equal(logits(model, documents), logits(base, documents))
    for name, layer in lora.adapters(model).items():
        a, bound = layer.lora_A.weight, layer.in_features**-0.5
        assert (
            a.abs().max() <= bound
            and float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.3)
            and not layer.lora_B.weight.any()
        )
        assert torch.equal(a, again.get_submodule(name).lora_A.weight) and not torch.equal(
            a, other.get_submodule(name).lora_A.weight
        )
    first = [layer.lora_A.weight[0, :8].detach() for layer in lora.adapters(model).values()]
    assert all(not torch.equal(x, y) for i, x in enumerate(first) for y in first[:i])


@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_unmerged_and_generation_too(tied, tmp_path):
    base, model = adapted(tie_word_embeddings=tied, vocab_size=600)
    folder = saved(model, tmp_path / "merged")
    merged = build_model(model.config, folder, device="cpu", seed=0, weight_dtype=torch.float64)
    assert not lora.adapters(merged)
    saved(base, tmp_path / "base")
    config = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    (folder / "adapter/adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "base")})
    )
    from_adapter = build_model(
        model.config, folder / "adapter", device="cpu", seed=0, weight_dtype=torch.float64
    )
    documents = [torch.randint(50, (n,)) for n in (12, 9)]
    want = logits(model, documents)
    assert (logits(base, documents) - want).norm() / want.norm() > 1e-3
    for other in (merged, from_adapter):
        assert (logits(other, documents) - want).norm() / want.norm() < 1e-10
        write = functools.partial(
            generate,
            prompts=[d.tolist() for d in documents],
            max_new_tokens=20,
            stop_ids=[],
            temperature=1.0,
            seeds=[1, 2],
        )
        for a, b in zip(write(other), write(model), strict=True):
            assert a.tokens == b.tokens and np.allclose(a.logp, b.logp, atol=1e-9)


def test_a_bf16_base_takes_small_updates_into_the_merged_weights(tmp_path):
    base = small().to(torch.bfloat16)
    model = lora.adapt(base, CONFIG, 0)
    with torch.no_grad():
        for layer in lora.adapters(model).values():
            layer.lora_B.weight.fill_(1e-5)
    tensors = load_file(saved(model, tmp_path / "m") / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    layer = model.layers[0].mlp.up_proj
    moved = tensors["model.layers.0.mlp.up_proj.weight"] - layer.weight.float()
    want = 7 / 3 * layer.lora_B.weight @ layer.lora_A.weight
    assert (
        moved - want
    ).norm() < 1e-2 * want.norm()  # W + x is rounded to fp32; in bf16 nothing of x would be left


# --- training -----------------------------------------------------------------------------


def documents(rng, count):
    made = []
    for _ in range(count):
        length = int(rng.integers(2, 12))
        weights = np.ones(length)
        weights[: rng.integers(1, length)] = 0
        made.append(
            WEIGHTINGS["token"](Document(rng.integers(0, 50, length).astype(np.int32), weights))
        )
    return made


def test_only_adapters_have_gradients_state_and_sync(monkeypatch):
    _, model = adapted()
    docs = documents(np.random.default_rng(0), 9)
    reduced = []
    monkeypatch.setattr(parallel, "active", lambda: True)
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda values, device=None: values)
    monkeypatch.setattr(parallel, "gather", lambda value: [value])
    monkeypatch.setattr(parallel, "_reduce", reduced.extend)
    workers.gradient(model, None, sft_loss, docs, 30)
    names = {
        f"{name}.{part}.weight" for name in lora.adapters(model) for part in ("lora_A", "lora_B")
    }
    assert (
        gradients(model).keys() == names and len(names) == 2 * 5 * 2 and len(reduced) == len(names)
    )
    optimizer = build_optimizer(model, 1e-3, (0.9, 0.98), 1e-8, 0.1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in names}
    optimizer.step()
    assert (
        len(optimizer.state)
        == len(names)
        == sum(len(group["params"]) for group in optimizer.param_groups)
    )
    assert all(
        torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen
    )


DROPPING = lora.LoraConfig(3, 7.0, dropout=0.25)


def dropping(checkpointing=False):
    """A fresh model with dropout, at the beginning of step 4."""
    _, model = adapted(DROPPING)
    model.activation_checkpointing = checkpointing
    model.dropout.begin(4)
    return model


def rank_of_two(rank, world, port, shares, results):
    """Rank 0 puts the gradient of the documents that both ranks hold."""
    workers.setup(world, rank, port)
    found = workers.gradient(dropping(), None, sft_loss, shares[rank], 23)[1].tolist()
    if rank == 0:
        results.put(found)
    parallel.barrier()
    parallel.close()


def test_how_the_batch_is_cut_does_not_change_the_gradient():
    """Micro-batches, order, recomputed activations, ranks: masks belong to tokens of documents."""
    docs = documents(np.random.default_rng(1), 11)
    shuffled = random.Random(0).sample(docs, len(docs))
    for make in (
        lambda: adapted(lora.LoraConfig(3, 7.0))[1],
        dropping,
        lambda: dropping(checkpointing=True),
    ):
        want = workers.gradient(make(), None, sft_loss, docs, 1000)[1]
        for cut, micro_batch_tokens in ((docs, 14), (docs, 23), (shuffled, 30)):
            assert (
                workers.gradient(make(), None, sft_loss, cut, micro_batch_tokens)[1] - want
            ).norm() < 1e-10 * want.norm()
    want = workers.gradient(dropping(), None, sft_loss, docs, 1000)[1]
    plain = workers.gradient(adapted(lora.LoraConfig(3, 7.0))[1], None, sft_loss, docs, 1000)[1]
    assert (plain - want).norm() > 0.05 * want.norm(), "the masks do something"
    for shares in ([docs[:5], docs[5:]], [[], docs]):
        got = workers.spawned(rank_of_two, 2, shares)
        assert (torch.tensor(got, dtype=torch.float64) - want).norm() < 1e-10 * want.norm()


def test_masks_that_belong_to_the_micro_batch_would_fail(monkeypatch):
    """What an earlier version did: it must not pass the comparison above."""
    docs, count = documents(np.random.default_rng(1), 11), []

    def per_micro_batch(tokens_T, positions_T):
        count.append(1)
        return lora.mix(torch.arange(len(tokens_T)) + 1000 * len(count))

    monkeypatch.setattr(lora, "token_keys", per_micro_batch)
    want = workers.gradient(dropping(), None, sft_loss, docs, 1000)[1]
    count.clear()
    assert (
        workers.gradient(dropping(), None, sft_loss, docs, 23)[1] - want
    ).norm() > 1e-3 * want.norm()


def test_the_gradient_on_average_over_masks_is_near_the_one_without():
    """In a single layer, where the loss is linear in what the masks multiply, it is that one."""
    _, model = adapted(DROPPING)
    layer, x = model.layers[0].mlp.up_proj, torch.randn(7, 24, dtype=torch.float64)
    seen = torch.zeros(7, 24, dtype=torch.float64)
    for step in range(4000):
        model.dropout.begin(step)
        model.dropout.see(model, (torch.arange(7), torch.arange(7)))
        seen += layer.masked(x) / 4000
    error = (seen - x).abs() / x.abs()  # of a mean of 4,000: √(0.25 / 0.75 / 4000) = 0.009
    assert error.max() < 5 * 0.0092 and error.mean() == pytest.approx(
        0.0092 * (2 / np.pi) ** 0.5, rel=0.2
    )


def python_mix(x):
    """splitmix64's finaliser in whole numbers, as published."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_masks_are_what_is_said_of_them():
    """Recomputed in plain whole numbers, for documents that are packed one behind the other."""
    _, model = adapted(DROPPING)
    model.dropout.begin(4)
    packed = [[3, 1, 4], [1, 5, 9, 2, 6], [7]]
    tokens_T = torch.tensor([t for d in packed for t in d])
    positions_T = torch.tensor([i for d in packed for i in range(len(d))])
    model.dropout.see(model, (tokens_T, positions_T))
    layer = model.layers[1].self_attn.o_proj
    got = (layer.masked(torch.ones(9, 24, dtype=torch.float64)) != 0).tolist()
    golden, want = 0x9E3779B97F4A7C15, []
    for d in packed:
        places = [python_mix((i + 1) * golden % 2**64) for i in range(len(d))]
        whole = sum(python_mix(p ^ t) for p, t in zip(places, d, strict=True)) % 2**64
        for place in places:
            stream = python_mix(python_mix(whole ^ place) ^ lora._seed(0, 4, layer.name) % 2**64)
            words = [python_mix((stream + j * golden) % 2**64) for j in range(6)]
            quarters = [(word >> shift) % 2**16 for word in words for shift in (0, 16, 32, 48)]
            want.append(
                [(q + 2**15) % 2**16 < 0.75 * 2**16 for q in quarters]
            )  # signed: the lowest is -2^15
    assert got == want


def test_masks_keep_their_share_and_are_independent():
    rng = np.random.default_rng(3)
    lengths = rng.integers(5, 60, 200)
    tokens_T = torch.from_numpy(rng.integers(0, 50, lengths.sum()))
    positions_T = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))

    def mask(share=0.25, seed=0, step=1, layer="layers.0.mlp.up_proj", shift=0, width=101):
        """[T, width] of 0 and 1; no multiple of four is asked for."""
        dropout = lora.Dropout(share, seed)
        dropout.begin(step)
        dropout.see(None, ((tokens_T + shift) % 50, positions_T))
        masked = dropout(torch.ones(len(tokens_T), width, dtype=torch.float64), layer)
        assert len(masked.unique()) == 2 and float(masked.max()) == pytest.approx(
            1 / (1 - share), rel=1e-4
        )
        return (masked != 0).double()

    for share in (0.01, 0.1, 0.25, 0.5, 0.9):
        got, deviation = (
            float(mask(share).mean()),
            (share * (1 - share) / len(tokens_T) / 101) ** 0.5,
        )
        assert abs(got - (1 - share)) < 5 * deviation + 2**-17, share
    first = mask()
    assert torch.equal(first, mask())
    limit = 5 / len(tokens_T) ** 0.5
    features = torch.corrcoef(first.T) - torch.eye(101)
    assert features.abs().max() < limit, "features of one token"
    for other in (
        mask(step=2),
        mask(seed=5),
        mask(layer="layers.1.mlp.up_proj"),
        mask(shift=1),
        first.roll(1, 0),
    ):
        both = torch.stack((first.flatten(), other.flatten()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 5 / first.numel() ** 0.5
        each = torch.corrcoef(torch.cat((first.T, other.T)))[:101, 101:]
        assert each.abs().max() < limit, "the same and other features under another key"
    per_token = first.sum(1)
    assert float(per_token.var()) == pytest.approx(101 * 0.25 * 0.75, rel=0.1), (
        "as many are kept as a coin would keep"
    )


def test_masks_belong_to_seed_step_and_document():
    docs = documents(np.random.default_rng(2), 6)

    def step(number, seed=0, checkpointing=False, applied=True):
        model = shaken(lora.adapt(small(), DROPPING, seed, torch.float64))
        for layer in lora.adapters(model).values():
            layer.init_weights(0)  # adapters of one seed, masks of another
        shaken(model).activation_checkpointing = checkpointing
        torch.manual_seed(random.randrange(1 << 30))  # the global state has no say
        model.dropout.begin(number, applied)
        return workers.gradient(model, None, sft_loss, docs, 20)[1]

    first = step(1)
    assert torch.equal(first, step(1)) and torch.equal(first, step(1, checkpointing=True))
    assert not torch.allclose(first, step(2)) and not torch.allclose(first, step(1, seed=5))
    assert torch.equal(step(1, applied=False), step(2, seed=5, applied=False))

    model = dropping()
    tokens = docs[0].tokens

    def run():
        attend = PackedAttention([len(tokens)])
        return model(torch.from_numpy(tokens).long(), torch.arange(len(tokens)), attend)

    whole = shaken(lora.adapt(small(), lora.LoraConfig(3, 7.0), 0, torch.float64))
    want = whole(
        torch.from_numpy(tokens).long(), torch.arange(len(tokens)), PackedAttention([len(tokens)])
    )
    with torch.no_grad():
        assert torch.equal(run(), want)  # generation and scoring
    assert not torch.allclose(run(), want)
    model.dropout.begin(4, applied=False)
    assert torch.equal(run(), want)
    model.dropout.begin(4)
    model.eval()
    assert torch.equal(run(), want)


def test_flops_leave_out_the_gradients_of_what_is_frozen():
    from data.batch import GlobalBatch

    base, model = adapted()
    batch = GlobalBatch(documents(np.random.default_rng(0), 4))
    tokens, rows = sum(batch.lengths), batch.loss_rows
    full = step_flops(batch, small(), None, 50)
    matrices = sum(p.numel() for n, p in base.layers.named_parameters() if p.dim() == 2)
    more = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert step_flops(batch, model, None, 50) == pytest.approx(
        full - 2 * tokens * matrices - 2 * rows * 24 * 50 + 6 * tokens * more
    )


# --- one copy of the base; the reference --------------------------------------------------

GRPO = [
    "--mode=grpo",
    "--device=cpu",
    *SMALL,
    "--steps=2",
    "--model=tiny-teacher",
    "--grpo_samples=2",
    "--sample_tokens=6",
    "--lr=1e-2",
]
GRPO += ["--eval_examples=2", "--lora_rank=4", "--grpo_kl_coef=0.1"]


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def letters(example, completion):\n"
        "    return completion.count('e') + 0.01 * len(completion)\n"
    )
    return f"--grpo_reward={tmp_path}/mine.py:letters"


def test_a_grpo_step_holds_the_base_once_and_merged_weights_once(tmp_path, reward, monkeypatch):
    """In bf16, as on a GPU: policy and reference share the base; adapters are fp32.

    Generation has the adapted layers with the adapters merged, and shares the rest.

    Every tensor that Python can reach in the middle of the step is counted.
    """
    seen, copies = [], []
    step, inner = train.forward_backward, generate

    def writing(author, *args, **more):
        copies.append(author.model)
        return inner(author, *args, **more)

    def counting(model, *args):
        gc.collect()
        shape = model.layers[0].mlp.down_proj.weight.shape
        tensors = [
            t
            for t in gc.get_objects()
            if type(t) in (torch.Tensor, torch.nn.Parameter) and t.shape == shape
        ]
        seen.append({(t.untyped_storage().data_ptr(), t.dtype) for t in tensors})
        return step(model, *args)

    gc.collect()  # what tests before this one left in cycles
    before = [
        id(t)
        for t in gc.get_objects()
        if type(t) in (torch.Tensor, torch.nn.Parameter) and t.shape == (96, 256)
    ]
    assert not before
    monkeypatch.setattr("rl.rollout.generate", writing)
    monkeypatch.setattr(train, "forward_backward", counting)
    kept, build = [], train.build
    monkeypatch.setattr(train, "build", lambda cfg, run: kept.append(run) or build(cfg, run))
    assert train.main([*GRPO, reward, "--dtype=bfloat16", f"--runs={tmp_path}", "--name=r"]) == 0
    (run,) = kept
    assert len(seen) == 2 and len(copies) == 2 and run.reference is not None
    assert copies[0] is copies[1]
    for storages in seen:
        assert len(storages) == 6 and {dtype for _, dtype in storages} == {
            torch.bfloat16
        }  # two per layer: the base's and the merged one
    storages = {}
    for model in (run.policy, run.reference, copies[-1]):
        for p in model.parameters():
            storages[p.untyped_storage().data_ptr()] = p.untyped_storage().nbytes()
    base = sum(p.numel() * 2 for p in run.reference.parameters())
    trained = sum(p.numel() for p in run.policy.parameters() if p.requires_grad)
    merged = 0  # the layers' matrices, and the biases that were joined
    for name, p in run.reference.layers.named_parameters():
        if "norm" not in name:
            merged += p.numel() * 2
    assert sum(storages.values()) == base + trained * 4 + merged
    assert {p.dtype for p in run.policy.parameters() if p.requires_grad} == {torch.float32}


def test_the_reference_is_the_base_and_its_log_probs_are_those_used(tmp_path, reward, monkeypatch):
    kept, build, used = [], train.build, []

    def building(cfg, run):
        kept.append(run)
        source, loss_fn = build(cfg, run)
        return (
            source,
            lambda hidden, head, frozen, batch: (
                used.append(batch) or loss_fn(hidden, head, frozen, batch)
            ),
        )

    monkeypatch.setattr(train, "build", building)
    assert train.main([*GRPO, reward, f"--runs={tmp_path}", "--name=r"]) == 0
    (run,) = kept
    plain = build_model(
        run.policy.config, None, device="cpu", seed=0
    )  # what --model=tiny-teacher --seed=0 is
    assert not lora.adapters(run.reference)
    for (name, p), (_, q) in zip(
        run.reference.named_parameters(), plain.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    for batch in used:
        with torch.no_grad():
            attend = PackedAttention(batch.lengths)
            for model, same in ((plain, True), (run.policy, False)):
                rows = (
                    batch.select(model(batch.tokens_T, batch.positions_T, attend))
                    @ model.head_VD[: run.vocab_size].T
                )
                logp = (
                    torch.log_softmax(rows.double(), 1)
                    .gather(1, batch.select(batch.target_T)[:, None])
                    .squeeze(1)
                )
                assert (
                    torch.allclose(logp, batch.select(batch.fields["ref_logp"]), atol=1e-5) == same
                )
    metrics = [m for m in timeless(tmp_path / "r") if "train/ref_kl" in m]
    assert (
        abs(metrics[0]["train/ref_kl"]) < 1e-9 and metrics[1]["train/ref_kl"] > 1e-7
    )  # B = 0 at first, then the policy moves


OFF = {
    "several updates": ["--grpo_minibatches_per_rollout=2"],
    "correction": ["--grpo_tis=truncate"],
    "KL in the reward": ["--grpo_kl_in=reward"],
    "sampled signal": [
        "--mode=kd",
        "--kd_prefix=student",
        "--kd_signal=sampled",
        "--kd_divergence=reverse_kl",
        "--kd_temperature=1",
    ],
}


@pytest.mark.parametrize("kind", [*OFF, "one update"])
def test_dropout_is_off_where_log_probs_are_compared(kind, tmp_path, reward, monkeypatch, capsys):
    """At the first update of a rollout the ratio to the policy that sampled is 1.

    The run says at its start that there is no dropout.
    """
    args = (
        [*GRPO, reward]
        if kind != "sampled signal"
        else [a for a in GRPO if not a.startswith(("--mode", "--grpo"))]
    )
    args += ["--teacher=random:tiny-teacher"] if kind == "sampled signal" else []
    begun, begin = [], lora.Dropout.begin
    monkeypatch.setattr(
        lora.Dropout,
        "begin",
        lambda self, *a, **more: begun.append(more["applied"]) or begin(self, *a, **more),
    )
    assert (
        train.main(
            [
                *args,
                *OFF.get(kind, []),
                "--lora_dropout=0.5",
                "--dtype=float64",
                f"--runs={tmp_path}",
                "--name=r",
            ]
        )
        == 0
    )
    lines = [m for m in timeless(tmp_path / "r") if "train/old_kl" in m]
    said = capsys.readouterr().out
    assert len(lines) == 2 and lines[1]["train/grad_norm"] > 0
    assert lines[0]["train/old_kl"] < 1e-12, (
        "the adapters have moved when the second step begins, not yet at the first"
    )
    if kind == "one update":
        assert begun == [True, True] and "not applied" not in said
        return
    assert begun == [False, False] and said.count("--lora_dropout is not applied") == 1
    if kind != "several updates":
        assert (
            lines[1]["train/old_kl"] < 1e-12
            and lines[1]["train/clip_low"] == lines[1]["train/clip_high"] == 0
        )


# --- the command --------------------------------------------------------------------------

MODES = {
    "sft": ["--mode=sft", "--lora_dropout=0.1", "--micro_batch_tokens=120"],
    "kd": [
        "--mode=kd",
        "--teacher=random:tiny-teacher",
        "--lora_rslora",
        "--lora_targets=q_proj,down_proj",
    ],
    "on-policy kd": [
        "--mode=kd",
        "--teacher=random:tiny-teacher",
        "--kd_prefix=student",
        "--sample_tokens=5",
        "--activation_checkpointing",
        "--lora_dropout=0.2",
    ],
    "grpo": [*GRPO, "--grpo_minibatches_per_rollout=2"],
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_runs_is_cut_resumed_and_evaluated(mode, tmp_path, reward, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = [
        "--device=cpu",
        *SMALL,
        *MODES[mode],
        "--lora_rank=3",
        "--lora_alpha=6",
        "--steps=3",
        "--save_every=1",
        "--eval_every=2",
    ]
    args += ["--name=r", "--lr=1e-2", *([reward] if mode == "grpo" else [])]
    assert train.main([*args, "--runs=whole"]) == 0, capsys.readouterr().err
    with monkeypatch.context() as m:
        clip = train.clip_gradients
        calls = []

        def killed(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt  # in the middle of the second step
            return clip(*arguments)

        m.setattr(train, "clip_gradients", killed)
        assert train.main([*args, "--runs=cut"]) == 130
    assert RunFolder("cut/r").steps() == [1]
    assert train.main(["--name=r", "--resume", "--runs=cut"]) == 0
    assert timeless(tmp_path / "cut/r") == timeless(tmp_path / "whole/r") != []
    for name in (
        "model.safetensors",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "trainer/optimizer.safetensors",
    ):
        a, b = (tmp_path / w / "r/checkpoints/step-3" / name for w in ("cut", "whole"))
        assert a.read_bytes() == b.read_bytes(), name
    step = tmp_path / "whole/r/checkpoints/step-3"
    with safe_open(step / "trainer/optimizer.safetensors", framework="pt") as f:
        assert all(".lora_" in key for key in f.keys()) and len(f.keys()) > 0
    moved = load_file(step / "adapter/adapter_model.safetensors")
    assert all(t.any() for t in moved.values())  # every B has left 0
    if mode == "sft":
        assert (
            max(timeless(tmp_path / "whole/r")[1:3], key=len)["train/tokens"] > 120
        )  # several micro-batches
    capsys.readouterr()
    assert (
        evaluation.main(
            [
                "whole/r",
                "--tasks=word_problems",
                "--greedy",
                "--limit=2",
                "--max_tokens=4",
                f"--out={tmp_path}/out",
            ]
        )
        == 0
    )
    assert "word_problems" in capsys.readouterr().out


def test_the_adapter_of_a_run_and_its_merged_weights_are_one_model(tmp_path, monkeypatch):
    """A chain: LoRA on a folder, then its adapter folder as the model of another run."""
    monkeypatch.chdir(tmp_path)
    common = [
        "--mode=sft",
        "--device=cpu",
        *SMALL,
        "--steps=1",
        "--lr=1e-1",
        "--eval_examples=0",
        "--warmup=0",
    ]
    assert train.main([*common, "--name=base"]) == 0
    base = "runs/base/checkpoints/step-1"
    assert train.main([*common, f"--model={base}", "--lora_rank=4", "--name=a"]) == 0
    folder = tmp_path / "runs/a/checkpoints/step-1"
    settings = json.loads((folder / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / base)
    assert run_of(folder / "adapter") == run_of(folder) == tmp_path / "runs/a"
    merged, subject = find(str(folder)).model(), find(str(folder / "adapter"))
    got = subject.model()
    for (name, p), (_, q) in zip(merged.named_parameters(), got.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    before = subject.sha256
    (folder / "adapter/SHA256SUMS").unlink()  # changed on purpose
    (folder / "adapter/adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    assert find(str(folder / "adapter")).sha256 != before
    (folder / "adapter/adapter_config.json").write_text(json.dumps(settings))
    assert train.main([*common, f"--model={folder}/adapter", "--lora_rank=2", "--name=b"]) == 0
    assert train.main([*common, f"--model={folder}", "--lora_rank=2", "--name=c"]) == 0
    assert timeless(tmp_path / "runs/b") == timeless(tmp_path / "runs/c")
    assert (
        json.loads(
            (tmp_path / "runs/b/checkpoints/step-1/adapter/adapter_config.json").read_text()
        )["base_model_name_or_path"]
        is None
    )


# --- what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "args,words",
    [
        (["--lora_rank=-1"], "--lora_rank"),
        (["--lora_alpha=8"], "lora_alpha is not read with lora_rank=0"),
        (
            ["--lora_rank=4", "--lora_targets=q_proj,lm_head"],
            "no layer 'lm_head'; choose from q_proj",
        ),
        (["--lora_rank=4", "--lora_dropout=1"], "--lora_dropout"),
        (["--lora_rank=4", "--lora_alpha=0"], "--lora_alpha"),
    ],
)
def test_wrong_options_are_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--mode=sft", *args]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_run_keeps_its_adapters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = ["--mode=sft", "--device=cpu", *SMALL, "--steps=1", "--eval_examples=0", "--lora_rank=2"]
    assert train.main([*args, "--name=r"]) == 0
    for change in ("--lora_rank=4", "--lora_alpha=1", "--lora_targets=q_proj", "--lora_rslora"):
        assert train.main(["--name=r", "--resume", change]) == 2
        assert "the run was begun with" in capsys.readouterr().err
    (tmp_path / "runs/r/checkpoints/step-1/adapter/adapter_model.safetensors").unlink()
    assert train.main(["--name=r", "--resume", "--steps=2"]) == 2
    assert "adapter_model.safetensors is not there" in capsys.readouterr().err
