"""How long a worker takes from its start to its first tile, with everything on disk already, and where that time goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping

from backend.bench.material import swin_checkpoint
from backend.bench.measure import Figure, Plan, below
from backend.errors import BackendError
from backend.jobs.pool import settings_environ

_SCRIPT = """
import json, time
marks = [("interpreter", time.time())]
def mark(name): marks.append((name, time.time()))
import torch
mark("import torch")
from backend.inference.engine import load_engine
from backend.settings import load_settings
import mmm
mark("import mmm")
import sys
engine = load_engine(load_settings(), sys.argv[1])
mark("load the model")
import numpy as np
engine.encode([np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)], 1)
mark("first tile")
print(json.dumps(marks))
"""


class WorkerDidNotStart(BackendError):
    """The process that stands for a worker ended with an error."""

    code = "worker_did_not_start"


def run(plan: Plan) -> list[Figure]:
    """Seconds of a fresh process, by stage; the median run of several (the first of all is not counted)."""
    settings = plan.settings.model_copy(update={"model": str(swin_checkpoint(plan))})
    runs = [_once(settings_environ(settings), plan.device) for _ in range(plan.pick(1, 2, 4))]
    counted = sorted(runs[1:] or runs, key=lambda stages: sum(stages.values()))
    stages = counted[len(counted) // 2]
    figures = [Figure("start", stage, seconds, "s") for stage, seconds in stages.items()]
    return [*figures, below("start", "worker start to first tile", sum(stages.values()), 15, "s")]


def _once(environ: Mapping[str, str], device: str) -> dict[str, float]:
    environment = {**os.environ, **environ}
    started = time.time()
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, device], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise WorkerDidNotStart(f"It said: {done.stderr.strip()[-300:]}", hint="Run `wsc-backend doctor`.")
    stages, before = {}, started
    for name, at in json.loads(done.stdout.splitlines()[-1]):
        stages[name], before = at - before, at
    return stages
