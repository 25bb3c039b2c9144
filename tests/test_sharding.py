"""Sharded models: the gradients, updates, samples and files of one process (DESIGN invariant 7)."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.batch import Document
from losses.grpo import GRPOConfig, grpo_loss
from losses.kd import KDConfig, kd_loss
from losses.sft import sft_loss
from model import lora, parallel, sharding
from model.checkpoint import save_model
from model.generate import generate
from model.load import Checkpoint, load_frozen, load_policy
from model.optim import build_optimizer, clip_gradients
from model.tensors import stream_tensors
from model.transformer import ModelConfig
from run import RunFolder
from tests import distributed_workers as workers

VOCAB = 40
# 45 rows, 3 key-value heads: nothing divides by 4
SHAPE = ModelConfig(
    vocab_size=45,
    hidden_size=18,
    intermediate_size=26,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=6,
)
UNTIED = ModelConfig(
    vocab_size=49,
    hidden_size=14,
    intermediate_size=22,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    tie_word_embeddings=False,
    qk_norm=True,
)
LORA = lora.LoraConfig(3, 7.0, dropout=0.25)
SHARES = ("dealt", "a rank without micro-batches")


def losses():
    kd = KDConfig("jsd", beta=0.3, temperature=1.7, t_squared=True, ce=0.4, vocab=VOCAB)
    grpo = GRPOConfig(
        variant="gspo",
        clip_low=0.2,
        clip_high=0.28,
        kl_coef=0.1,
        entropy_coef=0.01,
        temperature=1.3,
        vocab=VOCAB,
        kd_coef=0.5,
    )
    return {
        "sft": sft_loss,
        "kd": functools.partial(kd_loss, cfg=kd),
        "grpo": functools.partial(grpo_loss, cfg=grpo),
    }


def documents():
    rng = np.random.default_rng(0)
    made = []
    for length in (3, 9, 1, 14, 5, 5, 8, 2, 11):
        weights = np.ones(length)
        weights[: rng.integers(1, length + 1)] = 0
        fields = {"advantage": np.full(length, rng.normal())}
        for name in ("old_logp", "ref_logp", "sampler_logp"):
            fields[name] = rng.normal(-np.log(VOCAB), 0.3, length)
        fields["tis_weight"] = rng.uniform(0.5, 1.5, length)
        fields = {name: torch.from_numpy(x) for name, x in fields.items()}
        tokens = rng.integers(0, VOCAB, length).astype(np.int32)
        made.append(Document(tokens, weights, fields, teacher=int(length > 8)))
    return made


def shares(name, world):
    docs = documents()
    if name == "dealt":
        return [docs[rank::world] for rank in range(world)]
    return [[], docs] + [[]] * (world - 2)


def load(shape, mesh=None, lora_config=None, dtype=torch.float64):
    named = Checkpoint("", None, shape, None)
    return load_policy(named, None, lora_config, torch.device("cpu"), dtype, 0, mesh)[0]


def teachers(mesh=None, dtype=torch.float64):
    named = [Checkpoint("", None, shape, None) for shape in (UNTIED, SHAPE)]
    return [load_frozen(c, torch.device("cpu"), dtype, 1, mesh) for c in named]


def updates(model, frozen, loss_fn, docs, steps=2):
    """(metrics, gradient, its norm) of each of some updates, and the weights after them."""
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1)
    told = []
    for step in range(steps):
        if hasattr(model, "dropout"):
            model.dropout.begin(step)
        metrics, grad = workers.gradient(model, frozen, loss_fn, docs, 20)
        norm, finite = clip_gradients(model, 0.01)
        optimizer.step()
        assert finite
        told.append((metrics, grad.tolist(), norm))
    return told, torch.cat([p.flatten() for _, p in lora.plain_parameters(model)]).tolist()


def assert_near(got, want, what):
    for (metrics, grad, norm), (metrics0, grad0, norm0) in zip(got[0], want[0], strict=True):
        assert metrics == pytest.approx(metrics0, rel=1e-10, abs=1e-10), what
        assert norm == pytest.approx(norm0, rel=1e-10), what
        a, b = torch.tensor([grad, grad0], dtype=torch.float64)
        assert (a - b).norm() < 1e-10 * b.norm(), what
    a, b = torch.tensor([got[1], want[1]], dtype=torch.float64)
    assert (a - b).norm() < 1e-10 * b.norm(), what


@functools.cache
def alone(kind, shape, lora_config):
    """Updates on the whole batch in one process."""
    return updates(load(shape, None, lora_config), teachers(), losses()[kind], documents())


def update_main(rank, world, port, jobs, patience, sabotage, results):
    """Rank 0 puts, for each job, its updates, or the error that they end in."""
    workers.setup(world, rank, port, patience)
    sabotage()
    told = []
    for ranks, kind, shape, lora_config, share in jobs:
        mesh = sharding.make_mesh(ranks, "cpu") if ranks else None
        frozen = teachers(mesh)
        model = load(shape, mesh, lora_config)
        own = shares(share, world)[rank]
        try:
            told.append(updates(model, frozen, losses()[kind], own))
        except Exception as e:
            told.append(repr(e))
            break
    if rank == 0:
        results.put(told)
    if isinstance(told[-1], str):
        return  # the group is broken
    parallel.barrier()
    parallel.close()


def nothing():
    """No sabotage."""


def check(world, jobs, sabotage=nothing, patience=60):
    told = workers.spawned(update_main, world, jobs, patience, sabotage)
    for (ranks, kind, shape, lora_config, share), got in zip(jobs, told, strict=True):
        assert not isinstance(got, str), got
        what = f"{world} ranks, {ranks} together, {kind}, {share}, LoRA {bool(lora_config)}"
        assert_near(got, alone(kind, shape, lora_config), what)


def test_four_ranks_sharded_and_hybrid_update_as_one_process():
    jobs = [
        (ranks, kind, SHAPE, lora_config, SHARES[n % 2])
        for ranks in (4, 2)
        for n, (kind, lora_config) in enumerate(
            [("sft", None), ("kd", None), ("grpo", None), ("kd", LORA)]
        )
    ]
    check(4, [*jobs, (4, "kd", UNTIED, None, SHARES[1])])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
def test_every_mode_and_mesh(world):
    check(
        world,
        [
            (ranks, kind, shape, lora_config, share)
            for ranks in (0, world, 2)
            if world % (ranks or 1) == 0
            for kind in losses()
            for shape in (SHAPE, UNTIED)
            for lora_config in (None, LORA)
            for share in SHARES
        ],
    )


# --- what goes wrong without its cure -------------------------------------------------------------


def a_mean():
    """FSDP's default: gradients are averaged."""
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.set_gradient_divide_factor = lambda self, factor: None


def a_mean_of_blocks():
    """The call is not recursive: on the root alone, blocks still divide."""
    from torch.distributed.fsdp import FSDPModule

    before = FSDPModule.set_gradient_divide_factor

    def on_root(self, factor):
        if hasattr(self, "layers"):
            before(self, factor)

    FSDPModule.set_gradient_divide_factor = on_root


def a_head_in_shards():
    """The root becomes shards again as forward ends, and the loss reads the head after that."""
    from torch.distributed import fsdp

    before = fsdp.fully_shard
    fsdp.fully_shard = lambda *args, **more: before(*args, **more | {"reshard_after_forward": True})


def no_lockstep():
    """Ranks have as many forward passes as micro-batches."""
    sharding.Lockstep.before = lambda self, *_: None


def no_final_meeting():
    """A rank without further micro-batches goes on to the gradients' shards."""
    parallel.sync_gradients.__globals__["meet"] = lambda number=-1: None


def stale_root():
    """What is around the blocks stays whole, as it was before the optimizer's step."""
    from torch.distributed.fsdp import FSDPModule

    FSDPModule.reshard = lambda self: None


@pytest.mark.parametrize("sabotage", [a_mean, a_mean_of_blocks, a_head_in_shards, stale_root])
def test_without_a_cure_the_comparison_fails(sabotage):
    with pytest.raises(AssertionError):
        check(2, [(2, "kd", SHAPE, None, SHARES[0])], sabotage)


@pytest.mark.slow
@pytest.mark.parametrize("sabotage", [no_lockstep, no_final_meeting])
def test_without_a_cure_ranks_wait_for_each_other(sabotage):
    with pytest.raises(AssertionError, match="Error"):
        check(2, [(2, "kd", SHAPE, None, SHARES[1])], sabotage, patience=5)


def test_a_tied_head_is_one_parameter():
    """So that no sharding, and no `to_empty`, can untie it."""
    model = load(SHAPE)
    assert model.head_VD is model.embed_tokens.weight
    assert "lm_head.weight" not in dict(model.named_parameters())


# --- files and samples ----------------------------------------------------------------------------


class NoTokenizer:
    def save(self, folder):
        (Path(folder) / "tokenizer.json").write_text("{}")


def write(path, model, optimizer, average=None):
    """A checkpoint of a run."""
    folder = RunFolder(path)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    write_model = functools.partial(save_model, model, tokenizer=NoTokenizer(), stop_ids=[1])
    folder.save(1, model, optimizer, write_model, {"counters": 7}, average=average)
    return folder


def trained(mesh, lora_config, docs):
    """A model and its optimizer after an update, and another one of the same kind."""
    model = load(SHAPE, mesh, lora_config)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1)
    workers.gradient(model, None, sft_loss, docs, 20)
    optimizer.step()
    average = load(SHAPE, mesh, lora_config).requires_grad_(False)
    return model, optimizer, average


def full_state(model, optimizer, average):
    """Every tensor of a run, whole, in the order of the parameters."""
    state = {}
    for name, p in model.named_parameters():
        parts = {"weight": p, **optimizer.state.get(p, {}), "average": average.get_parameter(name)}
        state |= {f"{part}.{name}": workers.full(value) for part, value in parts.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def file_main(rank, world, port, root, docs, results):
    """Saves of each kind of mesh, which every other kind loads, and samples of all of them."""
    workers.setup(world, rank, port, 60)
    told = []
    for lora_config in (None, LORA):
        states, folders = {}, {}
        for ranks in (0, world, 2):
            mesh = sharding.make_mesh(ranks, "cpu") if ranks else None
            model, optimizer, average = trained(mesh, lora_config, docs[rank::world])
            folders[ranks] = write(root / f"{ranks}-{bool(lora_config)}", model, optimizer, average)
            states[ranks] = full_state(model, optimizer, average)
            prompts = [[3, 4, 5], [6]][: 2 if rank == 0 else 0]  # the others have none
            texts = generate(
                model, prompts, 6, [1], vocab=VOCAB, temperature=1.0, seeds=[1, 2][: len(prompts)]
            )
            told.append([completion.tokens for completion in texts])
            parallel.barrier()
        for ranks in (0, world, 2):
            mesh = sharding.make_mesh(ranks, "cpu") if ranks else None
            for other, folder in folders.items():
                named = Checkpoint("", None, SHAPE, None)
                model, _ = load_policy(
                    named,
                    folder.step_folder(1),
                    lora_config,
                    torch.device("cpu"),
                    torch.float64,
                    0,
                    mesh,
                )
                optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1)
                average = load(SHAPE, mesh, lora_config).requires_grad_(False)
                assert folder.load(1, model, optimizer, average) == {"counters": 7}
                for name, value in full_state(model, optimizer, average).items():
                    assert torch.equal(value, states[other][name]), (ranks, other, name)
    if rank == 0:
        results.put(told)
    parallel.barrier()
    parallel.close()


def test_files_of_any_sharding_are_read_by_any_other(tmp_path):
    told = workers.spawned(file_main, 4, tmp_path, documents())
    assert told[0] == told[1] == told[2] and told[3] == told[4] == told[5], "samples"
    want = load_file(tmp_path / "0-False/checkpoints/step-1/model.safetensors")
    for ranks in (4, 2):
        step = tmp_path / f"{ranks}-False/checkpoints/step-1"
        got = load_file(step / "model.safetensors")
        assert got.keys() == want.keys() and {p.name for p in step.iterdir()} == {
            p.name for p in (tmp_path / "0-False/checkpoints/step-1").iterdir()
        }
        for name, value in want.items():
            assert (got[name] - value).norm() <= 1e-10 * value.norm()


def test_a_missing_shard_is_one_line(tmp_path):
    from errors import UserError

    shards = tmp_path / "trainer/optimizer"
    shards.mkdir(parents=True)
    tensors = {"a": torch.arange(6.0)}
    sharding.save_shards(tensors, shards)
    found = {"a": torch.zeros(6)}
    sharding.load_shards(shards, found.get)
    assert torch.equal(found["a"], tensors["a"])
    with pytest.raises(UserError, match="rows of a are missing"):
        sharding.load_shards(shards, {"a": torch.zeros(7)}.get)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_file_is_the_librarys_to_the_byte(tmp_path, dtype):
    shapes = {"model.b": [3, 5], "model.a": [7], "lm_head.weight": [2, 3, 1], "e": [0, 4]}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "want", metadata={"format": "pt"})
    stream_tensors(shapes, dtype, tensors.items(), tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == (tmp_path / "want").read_bytes()
