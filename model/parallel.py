"""The process group: sums over ranks, one gradient sync, work that ranks do together.

Without torchrun, in one process, all of it does nothing.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import os
import re
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from errors import RunFailed, UserError, say, system_error
from files import reason
from kernels import backend
from model.places import Place, place
from model.watch import Cause, Watch
from signals import Listener

BUCKET_ELEMENTS = 64 << 20
MEETING = 300.0  # seconds for which a process waits for the others to start
OF_THE_GROUP = ("gloo", "NCCL", "c10d", "Connection")  # words of errors that another rank made


def speaks() -> bool:
    """Whether this process speaks for all: before `init` too, whatever the environment holds."""
    if dist.is_initialized():
        return rank() == 0
    try:
        return place().rank == 0
    except UserError:
        return True


def is_first_to_say(line: str, is_own: bool) -> bool:
    """Whether no other rank has said this line: an error that all of them meet is said once.

    Ranks that have not met yet meet at torchrun's store, if there is one. Else rank 0 speaks, and
    who may be alone with its error (is_own).
    """
    try:
        if _store:
            store = _store[0]
        elif os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and place().world > 1:
            limit = datetime.timedelta(seconds=10)
            meeting: Any = rendezvous("env://", place().rank, place().world, timeout=limit)
            store = next(meeting)[0]
        else:
            return is_own or speaks()
        return store.add("said/" + hashlib.sha256(line.encode()).hexdigest(), 1) == 1
    except (RuntimeError, ValueError, UserError):  # the store is gone with rank 0, who has spoken
        return is_own


def init(device_type: str, patience: float | None = None) -> tuple[int, int, int]:
    """Join the process group if there is more than one rank.

    Args:
        patience: Seconds after which a rank that waits for another gives up; None: torch's own 10
            or 30 minutes.

    Returns:
        (rank, number of ranks, rank on this machine).

    Raises:
        UserError: The others cannot be met.
    """
    here = place()
    if here.note and here.note not in _said:
        _said.add(here.note)
        say(here.note)
    if here.world > 1 and not dist.is_initialized():
        _join(here, "nccl" if device_type == "cuda" else "gloo", patience)
    return here.rank, here.world, here.local_rank


class Device(NamedTuple):
    """Where this process computes, and as which rank."""

    device: torch.device
    compute_dtype: torch.dtype
    rank: int
    world: int


def choose_device(device: str, dtype: str, kernels: str) -> Device:
    """Pick device, dtype and kernels from the options of these names, and join the other ranks.

    "auto" is a GPU where there is one, in bf16; else the CPU, in fp32. Raises UserError.
    """
    kind = device
    if device == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    rank, world, local_rank = init(kind)
    chosen = torch.device("cpu")
    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK={local_rank} in the environment, but there are "
                f"{torch.cuda.device_count()} GPUs to be seen; start fewer processes"
            )
        number = local_rank
        if world == 1:
            gpus = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
            number = first_free(tuple(str(gpu.uuid) for gpu in gpus))
        chosen = torch.device("cuda", number)
        torch.cuda.set_device(chosen)
    try:
        backend.use(kernels)
    except ValueError as e:
        raise UserError(f"--kernels={kernels}: {e}") from None
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" else "float32"
    return Device(chosen, getattr(torch, dtype), rank, world)


@functools.cache
def first_free(gpus: tuple[str, ...]) -> int:
    """The number of the first GPU that no other run of this user has; 0 if all are taken.

    So the agents of a sweep, and runs that are started side by side, have a GPU each. It is this
    process's until it ends.
    """
    for number, gpu in enumerate(gpus):
        path = Path(tempfile.gettempdir()) / f"srlm-{os.getuid()}-gpu-{gpu}.lock"
        with contextlib.suppress(OSError):
            _claimed.append(open(path, "a"))
            fcntl.flock(_claimed[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number
    return 0


_claimed: list[Any] = []  # open files
_said: set[str] = set()  # notes are printed once per process


def _join(here: Place, engine: str, patience: float | None) -> None:
    if threading.current_thread() is threading.main_thread():
        _listener[:] = [Listener()]
        _listener[0].start()
    waits = (
        f"rank {here.rank} waits for the other {here.world - 1} of WORLD_SIZE={here.world} "
        f"at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    )
    alarm = threading.Timer(30, say, (waits,))
    alarm.daemon = True
    alarm.start()
    try:
        limit = datetime.timedelta(seconds=MEETING)
        meeting = rendezvous("env://", here.rank, here.world, timeout=limit)
        shared: Any = next(iter(meeting))[0]
        start = _name_of_start(shared, here)
    except (RuntimeError, ValueError, OSError) as e:  # torch's DistError is a RuntimeError
        raise UserError(
            f"{waits}, in vain ({reason(e)}); unset WORLD_SIZE to run as one process, "
            "or use torchrun"
        ) from None
    finally:
        alarm.cancel()
    # connections of their own: errors are said, and signs of life given, while others wait
    prefixed: Any = dist.PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    store, second, third = (prefixed(start, s) for s in (shared, shared.clone(), shared.clone()))
    _store[:] = [second]
    if patience is None:
        _watch[:] = [Watch(third, here.rank, here.world)]
        _watch[0].start()
    waiting = None if patience is None else datetime.timedelta(seconds=patience)
    dist.init_process_group(
        engine, store=store, rank=here.rank, world_size=here.world, timeout=waiting
    )


def _name_of_start(store: Any, here: Place) -> str:
    """A name that all ranks of this start know, and no earlier start had.

    torchrun's store outlives its restarts: the addresses and the last words of ranks that are gone
    would be taken for those of this start. Rank 0 answers whoever asks, under the asker's own name,
    until all who are there have said that they heard.
    """
    own, until = secrets.token_hex(8), time.monotonic() + MEETING
    if here.rank:
        store.set(f"asks/{here.rank}", own)
        name = store.get(f"answer/{own}").decode()  # waits
        store.set(f"heard/{name}/{here.rank}", "")
        return name
    missing = list(range(1, here.world))
    while missing:
        if time.monotonic() > until:
            raise RuntimeError(f"ranks {missing} did not come")
        for rank in missing:
            if store.check([f"asks/{rank}"]):
                store.set("answer/" + store.get(f"asks/{rank}").decode(), own)
        time.sleep(0.02)
        missing = [rank for rank in missing if not store.check([f"heard/{own}/{rank}"])]
    return own


_watch: list[Watch] = []  # of a group that has no patience of its own
_store: list[Any] = []  # of the group
_listener: list[Listener] = []


@contextmanager
def telling() -> Iterator[None]:
    """Tell the other ranks of an error inside `with`; a RunFailed says that one of them is gone."""
    try:
        yield
    except Exception as e:
        has_words = any(word in str(e) for word in OF_THE_GROUP)
        is_of_group = isinstance(e, RuntimeError) and (isinstance(e, dist.DistError) or has_words)
        words = re.sub(r"\[\S+:\d+\] ", "", reason(e))  # without gloo's place in its source
        if not _watch:
            if is_of_group:
                raise RunFailed(f"another rank is gone ({words})") from None
            raise
        with _ending_at_sigterm(_watch[0]) as watch:
            watch.is_leaving = True
            if is_of_group:
                cause = watch.lost(words)
                watch.linger()
                if cause.code == 2:
                    raise UserError(cause.words) from None
                raise RunFailed(f"{cause.words}; go on with --resume") from None
            said = system_error(e) if isinstance(e, OSError) else e
            kind = "" if isinstance(said, (UserError, RunFailed)) else f"{type(e).__name__}: "
            code = 2 if isinstance(said, UserError) else 1
            watch.tell(Cause(f"rank {rank()}: {kind}{reason(said)}", code))
            watch.linger()
            raise


@contextmanager
def _ending_at_sigterm(watch: Watch) -> Iterator[Watch]:
    """Inside, a rank that torchrun ends after another one leaves in good order: it is not gone."""

    def end(*_: object) -> None:
        watch.stop()
        os._exit(1)

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, end) if is_main else None
    try:
        yield watch
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def active() -> bool:
    """Whether there is more than one rank."""
    return dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 before `init`."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(values: Sequence[float], device: torch.device | str = "cpu") -> list[float]:
    """Element-wise sum of a list of numbers over ranks, in fp64."""
    if not active():
        return [float(v) for v in values]
    meet()
    total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def broadcast(value: Any) -> Any:
    """Rank 0's value on every rank. It is pickled: it comes from our own process group."""
    if not active():
        return value
    meet()
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def gather(value: Any) -> list[Any]:
    """Every rank's value, by rank."""
    if not active():
        return [value]
    meet()
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


_actions: list[Callable[[], object]] = []
_resting: list[Callable[[], object]] = []
_control: list[Any] = []  # of messages from CPU to CPU: no GPU waits for them


def register(action: Callable[[], object]) -> int:
    """The number of what all ranks must do when one does it. Called on all ranks, in one order."""
    if not _actions:
        _control[:] = [dist.new_group(backend="gloo")]
    _actions.append(action)
    return len(_actions) - 1


def when_resting(call: Callable[[], object]) -> None:
    """Let `call` be called wherever all ranks have come to what they do anyway."""
    _resting.append(call)


def meet(number: int = -1) -> None:
    """Return when it is time for the action `number`, or (-1) for what all ranks do anyway.

    Until then this rank takes part in the actions of others. Where ranks wish for several, the
    highest number is next: those who asked for it do it, the others take part. So a rank with fewer
    passes of a sharded model to compute, or none of its tensors to write, is waited for by nobody.
    """
    while _actions:
        wish = torch.tensor(number)
        dist.all_reduce(wish, dist.ReduceOp.MAX, group=_control[0])
        if int(wish) == number:
            break
        _actions[int(wish)]()
    if number < 0:
        for call in _resting:
            call()


def on_rank_0(rank: int, call: Callable[[], Any]) -> Any:
    """What `call` returns on rank 0, or the error that it raises there, on every rank.

    Work of rank 0 alone (a lock, a file) would otherwise fail alone: the other ranks would wait for
    it at the next sum, and end in a traceback of the process group.

    Args:
        rank: Of this process.
        call: Called on rank 0 only. What it returns must be picklable, and small.

    Raises:
        UserError or RunFailed as `call` does. Any other error of it is raised on rank 0, and the
        other ranks raise a RunFailed that names it.
    """
    value = reported = unexpected = None
    if rank == 0:
        try:
            value = call()
        except (UserError, RunFailed) as e:
            reported = e
        except Exception as e:  # the others must hear of it, whatever it is
            unexpected = e
            reported = RunFailed(f"rank 0 failed ({type(e).__name__}: {reason(e)})")
    value, reported = broadcast((value, reported))
    if unexpected:
        raise unexpected
    if reported:
        raise reported
    return value


def raise_on_all(error: Exception | None) -> None:
    """Raise the first error that a rank has, on every rank.

    Args:
        error: This rank's, or None.
    """
    for found in gather(error):
        if found:
            raise found


@contextmanager
def as_one() -> Iterator[None]:
    """Raise what one rank raises inside `with` on every rank; none waits for it in there."""
    error = None
    try:
        yield
    except (UserError, RunFailed) as e:
        error = e
    raise_on_all(error)


def reduce_metrics(sums: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[float, float]]:
    """Sum the ranks' (sum, count) pairs; a rank without micro-batches has none."""
    pairs = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    merged: dict[str, tuple[float, float]] = {}
    for part in gather(pairs):
        for name, (total, count) in part.items():
            old_total, old_count = merged.get(name, (0.0, 0.0))
            merged[name] = (old_total + total, old_count + count)
    return merged


@torch.no_grad()
def sync_gradients(model: torch.nn.Module) -> None:
    """Sum the gradients over ranks: the losses were divided by a global normalizer already.

    A rank without micro-batches contributes zeros. A sharded model's are summed by every backward
    pass.
    """
    if not active():
        return
    is_sharded = hasattr(model, "reshard")
    if is_sharded:
        meet()  # while another rank still computes, this one takes part
    bucket, size = [], 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if is_sharded:
            continue
        bucket.append(parameter.grad)
        size += parameter.grad.numel()
        if size >= BUCKET_ELEMENTS:
            _reduce(bucket)
            bucket, size = [], 0
    if bucket:
        _reduce(bucket)


def _reduce(grads: list[torch.Tensor]) -> None:
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    parts = flat.split([grad.numel() for grad in grads])
    for grad, part in zip(grads, parts, strict=True):
        grad.copy_(part.view_as(grad))


def barrier() -> None:
    """Wait for all ranks."""
    if active():
        meet()
        dist.barrier()


def close() -> None:
    """Leave the process group."""
    for watch in _watch:
        watch.stop()
    for listener in _listener:
        listener.stop()
    for held in (_watch, _store, _listener):
        held.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    _actions.clear()
    _resting.clear()
    _control.clear()


def leave(code: int) -> NoReturn:
    """Leave the process group, and end the process with this exit code.

    Runs that were complete have died as the interpreter took its objects apart ("terminate called
    without an active exception", on busy machines), probably of gloo's threads. So a process of a
    group ends at once.
    """
    if not dist.is_initialized():
        sys.exit(code)
    close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
