"""Stub until merged."""
import dataclasses, json
from pathlib import Path
@dataclasses.dataclass(frozen=True)
class Outcome:
    chain: tuple
    traces: tuple
    evals: Path | None
    kl: Path | None
    failed: str = ""
def write(out, title, seeds, arms, outcomes, claims):
    return "\n".join(f"{k}: {v}" for k, v in outcomes.items())
