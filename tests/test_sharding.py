"""Sharded models: the gradients, updates, samples and files of one process (DESIGN invariant 7)."""

import dataclasses
import functools
import signal
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train
from data.batch import Document, GlobalBatch
from errors import UserError
from losses.grpo import GRPOConfig, grpo_loss
from losses.kd import KDConfig, kd_loss
from losses.sft import sft_loss
from model import lora, parallel, sharding
from model.checkpoint import save_model
from model.generate import Engine, generate
from model.load import Checkpoint, load_frozen, load_policy
from model.optim import build_optimizer, clip_gradients
from model.tensors import stream_tensors
from model.transformer import ModelConfig
from run import RunFolder
from tests import distributed_workers as workers
from tests.test_train import SMALL, timeless

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


def updates(model, frozen, kind, docs, steps=2):
    """(metrics, gradient, its norm) of each of some updates, and the weights after them."""
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1, muon=kind == "kd")
    loss_fn = losses()[kind]
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
    return updates(load(shape, None, lora_config), teachers(), kind, documents())


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
            told.append(updates(model, frozen, kind, own))
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
        (4, "kd", SHAPE, None, SHARES[1]),
        (2, "grpo", UNTIED, None, SHARES[0]),
        (2, "kd", SHAPE, LORA, SHARES[1]),
    ]
    check(4, jobs)


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


GEMMA = dataclasses.replace(
    SHAPE, qk_norm=True, qkv_bias=False, norm_offset=1.0, sandwich_norms=True, scale_embedding=True
)


def bf16_main(rank, world, port, results):
    """Rank 0 puts how far gradients of fp32 weights and bf16 activations are from replicas'."""
    workers.setup(world, rank, port, 60)
    told = []
    for shape in (SHAPE, GEMMA):
        for lora_config in (None, LORA):
            grads = []
            for mesh in (None, sharding.make_mesh(world, "cpu")):
                model = load(shape, mesh, lora_config, torch.bfloat16)
                docs = documents()[rank::world]
                grads.append(workers.gradient(model, None, sft_loss, docs, 100)[1])
            assert grads[0].dtype == grads[1].dtype == torch.float32
            told.append(float((grads[1] - grads[0]).norm() / grads[0].norm()))
    if rank == 0:
        results.put(told)
    parallel.barrier()
    parallel.close()


@pytest.mark.slow
def test_bf16_is_the_arithmetic_of_replicas():
    """Blocks are gathered in bf16, as layers cast them; what is summed is in fp32."""
    told = workers.spawned(bf16_main, 2)
    print(told)
    assert max(told) < 1e-6


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
    """A rank without further micro-batches goes on to sums of all ranks."""
    before = parallel.meet

    def meet(number=-1):
        if number >= 0:
            before(number)

    parallel.meet = meet


def stale_root():
    """What is around the blocks stays whole, as it was before the optimizer's step."""
    sharding.Lockstep.rest = lambda self: None


@pytest.mark.parametrize(
    "sabotage, words",
    [
        (a_mean_of_blocks, "2 together"),
        (a_head_in_shards, "DTensor"),
        pytest.param(a_mean, "2 together", marks=pytest.mark.slow),
        pytest.param(stale_root, "", marks=pytest.mark.slow),
    ],
)
def test_without_a_cure_the_comparison_fails(sabotage, words):
    with pytest.raises(AssertionError, match=words):
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
    folder.save(1, model, optimizer, write_model, STATE, average=average)
    return folder


def trained(mesh, lora_config, docs):
    """A model and its optimizer after an update, and another one of the same kind."""
    model = load(SHAPE, mesh, lora_config)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1, muon=True)
    workers.gradient(model, None, sft_loss, docs, 20)
    optimizer.step()
    average = load(SHAPE, mesh, lora_config).requires_grad_(False)
    return model, optimizer, average


# as a run after one step has it
STATE = {"counters": {"tokens": 7}, "source": [{"consumed": 1}]}


def full_state(model, optimizer, average):
    """Every tensor of a run, whole, in the order of the parameters."""
    state = {}
    for name, p in model.named_parameters():
        parts = {"weight": p, **optimizer.state.get(p, {}), "average": average.get_parameter(name)}
        state |= {f"{part}.{name}": workers.full(value) for part, value in parts.items()}
    return {name: value.detach().clone() for name, value in state.items()}


def file_main(rank, world, port, root, docs, configs, results):
    """Saves of each kind of mesh, which every other kind loads, and samples of all of them."""
    workers.setup(world, rank, port, 60)
    told = []
    for lora_config in configs:
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
                optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1, muon=True)
                average = load(SHAPE, mesh, lora_config).requires_grad_(False)
                assert folder.load(1, model, optimizer, average) == STATE
                for name, value in full_state(model, optimizer, average).items():
                    assert torch.equal(value, states[other][name]), (ranks, other, name)
    if rank == 0:
        results.put(told)
    parallel.barrier()
    parallel.close()


def lockstep_main(rank, world, port, jobs, results):
    """Rank 0 puts, for each job, what all ranks generate with gathered weights and in shards."""
    workers.setup(world, rank, port, 60)
    told = []
    for ranks, lora_config in jobs:
        model, said = load(SHAPE, sharding.make_mesh(ranks, "cpu"), lora_config), []
        prompts = [[[3, 4, 5], [6], [7, 8]], [], [[9] * 4], [[2, 3]]][rank]
        engines = []
        for decodes_in_shards in (False, True):
            model.decodes_in_shards = decodes_in_shards
            engines.append(Engine(model))
            assert isinstance(engines[-1].model, sharding.InShards) == decodes_in_shards
        for limit in (9, 1 + 3 * rank):  # the second time after an update, and for other lengths
            for engine in engines:
                texts = generate(
                    engine,
                    prompts,
                    limit,
                    [1],
                    vocab=VOCAB,
                    temperature=1.0,
                    seeds=list(range(len(prompts))),
                    batch_size=2,
                )
                said.append(parallel.gather([(c.tokens, c.logp) for c in texts]))
            updates(model, None, "sft", documents()[rank::world], 1)
        told.append(said)
    if rank == 0:
        results.put(told)
    parallel.barrier()
    parallel.close()


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_samples_in_lockstep_are_those_of_gathered_weights(world):
    jobs = [(world, None), (2, LORA)]
    for said in workers.spawned(lockstep_main, world, jobs):
        assert said[0] != said[2], "an update changes what is sampled"
        for gathered, in_shards in (said[:2], said[2:]):
            assert sum(map(len, gathered)) == (3 if world == 2 else 5)
            for mine, others in zip(sum(gathered, []), sum(in_shards, []), strict=True):
                assert mine[0] == others[0] and mine[1] == pytest.approx(others[1], abs=1e-10)


@pytest.mark.slow
def test_adapters_of_any_sharding_are_read_by_any_other(tmp_path):
    told = workers.spawned(file_main, 4, tmp_path, documents(), [LORA])
    assert told[0] == told[1] == told[2], "samples"


@pytest.mark.slow
def test_files_of_any_sharding_are_read_by_any_other(tmp_path):
    told = workers.spawned(file_main, 4, tmp_path, documents(), [None])
    assert told[0] == told[1] == told[2], "samples"
    want = load_file(tmp_path / "0-False/checkpoints/step-1/model.safetensors")
    for ranks in (4, 2):
        step = tmp_path / f"{ranks}-False/checkpoints/step-1"
        got = load_file(step / "model.safetensors")
        assert got.keys() == want.keys() and {p.name for p in step.iterdir()} == {
            p.name for p in (tmp_path / "0-False/checkpoints/step-1").iterdir()
        }
        for name, value in want.items():
            assert (got[name] - value).norm() <= 1e-10 * value.norm()
    model = load(SHAPE)
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1, muon=True)
    run = RunFolder(tmp_path / "4-False")
    run.load(1, model, optimizer)
    shards = sorted((run.step_folder(1) / "trainer/optimizer").glob("*.safetensors"))
    assert len(shards) == 4
    good = shards[1].read_bytes()
    with safe_open(shards[1], "pt") as tensors:
        spoiled = {key: tensors.get_tensor(key) for key in tensors.keys()}
        about = tensors.metadata()
    key = next(key for key in spoiled if key.startswith("exp_avg_sq."))
    save_file(spoiled | {key: spoiled[key] - 1e9}, shards[1], about)
    with pytest.raises(UserError, match=f"{key} holds numbers that no training leaves"):
        run.load(1, model, optimizer)
    shards[1].write_bytes(good[: len(good) // 2])
    with pytest.raises(UserError, match="damaged or unreadable safetensors file"):
        run.load(1, model, optimizer)
    shards[1].write_bytes(good)
    shards[2].unlink()
    with pytest.raises(UserError, match="rows of .* are missing; copy the files of all ranks"):
        run.load(1, model, optimizer)
    for file in shards[:2] + shards[3:]:
        file.unlink()
    with pytest.raises(UserError, match="optimizer: tensor step.* is missing; take another"):
        run.load(1, model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_streamed_file_is_the_librarys_to_the_byte(tmp_path, dtype):
    shapes = {"model.b": [3, 5], "model.a": [7], "lm_head.weight": [2, 3, 1], "e": [0, 4]}
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "want", metadata={"format": "pt"})
    stream_tensors(shapes, dtype, tensors.items(), tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == (tmp_path / "want").read_bytes()


# --- whole runs -----------------------------------------------------------------------------------

RUN = [*SMALL, "--dtype=float64", "--model=tiny", "--eval_every=2"]
SHARDED = ["--shard=on", "--shard_frozen=on"]
KD = ["--mode=kd", "--teacher=random:tiny-teacher", *RUN]


def stopping(step):
    """train.main that is told to stop in this step."""

    def main(argv):
        steps = []

        def clip(*args):
            steps.append(args)
            if len(steps) == step:
                signal.raise_signal(signal.SIGTERM)
            return before(*args)

        before = train.clip_gradients
        with mock.patch.object(train, "clip_gradients", clip):
            return train.main(argv)

    return main


def stopped_after_2(argv):
    return stopping(2)(argv)


def finished(*argv, cwd, **more):
    result = workers.run(*argv, cwd=cwd, timeout=300, **more)
    assert result.returncode == 0, result.stderr
    return result


def assert_same_run(got, want):
    """Divergences of nearly equal models are differences of larger numbers: 1e-12 of a nat."""
    assert len(got) == len(want)
    largest = 0.0
    for mine, other in zip(got, want, strict=True):
        assert mine == pytest.approx(other, rel=1e-9, abs=1e-12)
        for name, value in other.items():
            largest = max(largest, abs(mine[name] / value - 1) if value else 0)
    print(f"largest relative difference of a metric: {largest:.1e}")


@pytest.mark.slow
def test_a_run_goes_on_at_any_number_of_ranks(tmp_path):
    finished(*KD, "--name=alone", cwd=tmp_path)
    want = timeless(tmp_path / "runs/alone")
    finished(*KD, *SHARDED, "--name=r", cwd=tmp_path, ranks=4, main=stopped_after_2)
    go_on = ["--name=r", "--resume"]
    finished(*KD, *go_on, *SHARDED, cwd=tmp_path, ranks=2, main=stopped_after_2)
    assert RunFolder(tmp_path / "runs/r").steps() == [2, 4]
    finished(*KD, *go_on, *SHARDED, "--shard_ranks=4", cwd=tmp_path, ranks=8)
    assert_same_run(timeless(tmp_path / "runs/r"), want)
    for name in ("whole", "cut"):  # on as many ranks it is the same to the bit
        main = stopped_after_2 if name == "cut" else train.main
        finished(*KD, *SHARDED, f"--name={name}", cwd=tmp_path, ranks=2, main=main)
    finished(*KD, *SHARDED, "--name=cut", "--resume", cwd=tmp_path, ranks=2)
    assert timeless(tmp_path / "runs/cut") == timeless(tmp_path / "runs/whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["--mode=sft", "--lora_rank=2", "--lora_dropout=0.2", "--activation_checkpointing"],
        ["--mode=kd", "--teacher=self_average"],
        ["--mode=kd", "--teacher=self", "--kd_prefix=student", "--lora_rank=2"],
        [
            "--mode=grpo",
            "--model=runs/sft/checkpoints/step-6",
            "--grpo_samples=2",
            "--grpo_minibatches_per_rollout=2",
            "--grpo_kl_coef=0.1",
            "--sample_tokens=8",
            "--grpo_reward=random",
        ],
    ],
)
def test_a_sharded_run_is_the_run_of_one_process(tmp_path, more):
    if "--mode=grpo" in more:
        finished("--mode=sft", *RUN, "--name=sft", cwd=tmp_path)
    finished(*RUN, *more, "--name=alone", cwd=tmp_path)
    want = timeless(tmp_path / "runs/alone")
    in_step = ["--shard_ranks=2", "--shard_rollouts=on"]
    for name, ranks, options in (("two", 2, []), ("four", 4, in_step)):
        told = finished(
            *RUN, *more, *SHARDED, *options, f"--name={name}", cwd=tmp_path, ranks=ranks
        )
        assert ("generates in shards" in told.stdout) == (options == in_step)
        assert_same_run(timeless(tmp_path / "runs" / name), want)


# --- what it costs (docs/scaling.md) --------------------------------------------------------------

EVEN = dataclasses.replace(
    SHAPE, vocab_size=64, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2
)
EVEN = dataclasses.replace(EVEN, head_dim=8)


def count_bytes():
    """Counters of what this rank receives from now on: weights, gradients, sums between groups."""
    moved = Counter()

    def counted(names, factor):
        name = next(name for name in names if hasattr(dist, name))  # the first since torch 2.12
        before = getattr(dist, name)

        def call(*args, **more):
            size = dist.get_world_size(more["group"])
            tensors = [x for x in (*args, *more.values()) if isinstance(x, torch.Tensor)]
            if tensors[0].is_floating_point():  # messages of the lockstep are integers
                largest = max(x.nbytes for x in tensors)
                moved[names[-1]] += factor * (size - 1) * largest // size
            return before(*args, **more)

        setattr(dist, name, call)

    counted(("all_gather_single", "all_gather_into_tensor"), 1)
    counted(("reduce_scatter_single", "reduce_scatter_tensor"), 1)
    counted(("all_reduce",), 2)
    return moved


def held_bytes(tensors):
    storages = [sharding.local(x).untyped_storage() for x in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def cost_main(rank, world, port, shape, ranks, micro_batches, results):
    """Rank 0 puts the bytes that it receives in an update, and those that it holds after it."""
    workers.setup(world, rank, port, 60)
    mesh = sharding.make_mesh(ranks, "cpu") if ranks else None
    model, frozen = load(shape, mesh, dtype=torch.float32), None
    optimizer = build_optimizer(model, 1e-2, (0.9, 0.98), 1e-8, 0.1)
    if ranks:
        named = Checkpoint("", None, shape, None)
        frozen = load_frozen(named, torch.device("cpu"), torch.float32, 1, mesh)
    told = {}
    for name, teacher in {"student": None, "with a teacher": frozen}.items():
        moved = count_bytes()
        docs = [Document(np.arange(9, dtype=np.int32), np.ones(9))] * micro_batches
        batch = GlobalBatch(docs if rank == 0 else docs[:1])  # another rank has one
        train.forward_backward(
            model, [teacher] if teacher else [], sft_loss, batch, 1.0, 9, torch.device("cpu")
        )
        parallel.sync_gradients(model)
        told[name] = Counter(moved)
    optimizer.step()
    states = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
    parameters = list(model.parameters())
    told["held"] = {
        "weights": held_bytes(parameters),
        "gradients": held_bytes(p.grad for p in parameters),
        "optimizer": held_bytes(states),
    }
    parallel.barrier()
    if frozen:  # its forward passes are forgotten, though it has no backward pass
        state: Any = frozen
        assert not state._get_fsdp_state()._comm_ctx.post_forward_order
    if rank == 0:
        results.put(told)
    parallel.close()


def expected_bytes(model, world, ranks, micro_batches):
    """What docs/scaling.md says of an update in fp32."""
    blocks = sum(p.nbytes for p in model.layers.parameters())
    around = sum(p.nbytes for p in model.parameters()) - blocks
    groups, share = world // ranks, (ranks - 1) / ranks
    of_student = {
        "all_gather_into_tensor": share * (2 * micro_batches * blocks + around),
        "reduce_scatter_tensor": share * micro_batches * (blocks + around),
        "all_reduce": 2 * (groups - 1) / groups * micro_batches * (blocks + around) / ranks,
    }
    of_teacher = share * (micro_batches * blocks + around)
    return of_student, of_teacher


@pytest.mark.parametrize(
    "world, ranks",
    [(4, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((2, 2), (4, 4), (8, 4)))],
)
def test_bytes_are_those_of_the_formulas(world, ranks):
    told = workers.spawned(cost_main, world, EVEN, ranks, 3)
    of_student, of_teacher = expected_bytes(load(EVEN, dtype=torch.float32), world, ranks, 3)
    got = told["student"]
    assert {name: got[name] for name in of_student} == pytest.approx(of_student, rel=1e-3)
    more = told["with a teacher"]["all_gather_into_tensor"] - got["all_gather_into_tensor"]
    assert more == pytest.approx(of_teacher, rel=1e-3)


@pytest.mark.slow
def test_memory_falls_as_the_number_of_ranks_rises():
    large = dataclasses.replace(EVEN, hidden_size=512, intermediate_size=2048, vocab_size=8000)
    large = dataclasses.replace(large, num_layers=6, head_dim=64, num_heads=8, num_kv_heads=4)
    alone = workers.spawned(cost_main, 1, large, 0, 1)
    for world in (2, 4, 8):
        told = workers.spawned(cost_main, world, large, world, 1)
        for name, size in alone["held"].items():
            assert told["held"][name] == pytest.approx(size / world, rel=0.1), (world, name)
