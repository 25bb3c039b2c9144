"""What a study takes on the disk, said before it begins."""

import shutil
from pathlib import Path

import options
from config import Config
from errors import UserError
from eval.study.jobs import Job, flags
from eval.study.plan import Study
from eval.study.scheduler import is_done
from files import read_json
from model.checkpoint import HUB_ID
from model.hf import config_from_hf
from model.presets import PRESETS, RANDOM
from model.transformer import ModelConfig
from overview import bytes_of, checkpoints_at_once, sizes
from run import newest_checkpoint


def shape_of(name: str) -> ModelConfig | None:
    """The shape of a model that is here; None where it is still to be downloaded."""
    name = name.removeprefix(RANDOM)
    if name in PRESETS:
        return PRESETS[name]
    try:
        file = Path(newest_checkpoint(name, "model")) / "config.json"
        if not file.exists() and HUB_ID.fullmatch(name):
            from huggingface_hub import try_to_load_from_cache

            file = Path(str(try_to_load_from_cache(name, "config.json")))
        return config_from_hf(read_json(file, finite=True), file.parent)
    except (UserError, OSError):
        return None  # what is wrong with it is said by the run


def begins_from(job: Job | str) -> str:
    """The model that a chain of runs begins from."""
    while isinstance(job, Job):
        job = job.options["model"]
    return job


def disk_line(study: Study, out: Path, at_once: int) -> str:
    """A sentence on the bytes that the runs of a study take, and on those that are free.

    A finished run keeps its models; optimizer states are there while it runs.
    """
    kept, running, unknown = 0, [0], set()
    for job in study.jobs:
        if job.kind != "train" or is_done(out, job):
            continue
        start = begins_from(job)
        shape = shape_of(start)
        if shape is None:
            unknown.add(start)
            continue
        given = {k: v for k, v in job.options.items() if not isinstance(v, Job)}
        cfg = options.parse(Config, flags(given | {"model": start}), conditions=False)
        size, adapters = sizes(cfg, shape)
        count = checkpoints_at_once(cfg)
        stay = count if cfg.save == "last" else max(0, count - 1)
        kept += 4 * (size + adapters) * stay
        running.append(4 * (size + adapters + 2 * (adapters or size)) * count)
    total = kept + sum(sorted(running)[-at_once:])
    free = shutil.disk_usage(out).free
    line = f"disk: at most {bytes_of(total)} for the checkpoints of the runs that are left, "
    line += f"of which {bytes_of(kept)} stay; {bytes_of(free)} are free"
    if unknown:
        line += f"; not counted, as they are not here yet: {', '.join(sorted(unknown))}"
    return line + ("; THIS IS NOT ENOUGH" if total > free else "")
