"""What the processes of a test run: the backend's own commands, with a small computation in place of the model.

The reading is real (Redis, slide file, tissue, tiles), and so are store, jobs and pushes; only the encoder is a few lines of NumPy, so that
no process has to load torch. At each stage a bag can be held, or made to misbehave, by files under ``MODEL_DIR/hold`` and ``MODEL_DIR/do``.

    python fault_processes.py worker --device cpu --queues interactive,batch
    python fault_processes.py serve --with-workers
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from backend.errors import SlideUnreadable
from backend.jobs import bag_worker, tasks, worker
from backend.jobs.pool import WorkerPool
from backend.settings import Settings

WORKER = (sys.executable, str(Path(__file__)), "worker")
TWEAKS = "WSC_FAULT_TESTS"
"""Variable with a JSON object of module constants to shorten: ``{"backend.label_studio.predictor.CLAIM_TTL_S": 3}``."""

Progress = Callable[[str, int, int], None]


def apply_tweaks() -> None:
    """Shorten the waits that the test asks to shorten, in modules that this process needs anyway."""
    import importlib

    for name, value in json.loads(os.environ.get(TWEAKS, "{}")).items():
        module, _, constant = name.rpartition(".")
        setattr(importlib.import_module(module), constant, value)


def gate(settings: Settings, name: str, stage: str) -> None:
    """Misbehave if a file says so; wait here, as a slow stage does, while another file exists."""
    note(settings, "reached", f"{name}.{stage} {os.getpid()}")
    order = settings.model_dir / "do" / f"{name}.{stage}"
    if order.exists():
        misbehave(order.read_text(), settings, name)
    while (settings.model_dir / "hold" / f"{name}.{stage}").exists():
        time.sleep(0.01)


def misbehave(how: str, settings: Settings, name: str) -> None:
    """``die``: as by SIGKILL. ``hang``: in C, deaf to every signal but SIGKILL. ``touch``: the slide's file changes. ``refuse``: it cannot be read. ``device``: CUDA gives up."""
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "hang":
        hang_in_c()
    elif how == "touch":
        (settings.model_dir / "slides" / f"{name}.tif").touch()
    elif how == "refuse":
        raise SlideUnreadable(f"{name} cannot be read.")
    elif how == "device":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    else:
        raise ValueError(f"nobody knows how to {how}")


def hang_in_c() -> None:
    """Wait for a mutex that this thread holds itself: no signal handler of Python's runs until that ends, and it never does."""
    library = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def note(settings: Settings, ledger: str, line: str) -> None:
    with (settings.model_dir / ledger).open("a") as file:
        file.write(line + "\n")


def analyse(
    slide: dict[str, Any], *, key: str, settings: Settings, engine: Any, store: Any, progress: Progress
) -> object:
    """The pipeline's stages, with means of colours for latents."""
    from backend.results.bag import SLIDE_REF, BagResult
    from backend.slides.reader import open_slide
    from backend.slides.source import SlideRef, SourceResolver
    from backend.slides.tiles import read_tiles
    from backend.slides.tiling import make_bag

    ref = SlideRef.from_json(slide)
    name = Path(ref.locations[0]).stem
    note(settings, "analysed", f"{name} {os.getpid()}")
    progress("fetch", 0, 0)
    gate(settings, name, "fetch")
    (path,) = SourceResolver(settings).fetch(ref)
    progress("open", 0, 0)
    gate(settings, name, "open")
    with open_slide(path, settings) as opened:
        reader = opened.reader
        progress("tissue", 0, 0)
        gate(settings, name, "tissue")
        bag = make_bag(opened, settings, task_mpp=None)
        means = []
        progress("encode", 0, len(bag))
        for chunk in read_tiles(opened, bag, chunk=4, threads=1):
            means += list(chunk.reshape(len(chunk), -1, 3).mean(axis=1))
            progress("encode", len(means), len(bag))
            gate(settings, name, "encode")
    latents = np.tile(np.asarray(means, np.float16), 256)
    logits = np.tile(latents[:, :1].astype(np.float32) / 255, 8)
    facts = json.loads((settings.model_dir / "model.json").read_text())
    provenance = {**facts, "slide": path.name, "reader": reader, SLIDE_REF: json.dumps(ref.to_json())}
    progress("store", len(bag), len(bag))
    with _gated_fsync(settings, name):
        store.put(key, BagResult(bag, latents, logits, latents.mean(axis=0).astype(np.float32), provenance))
    gate(settings, name, "stored")
    return None


class _gated_fsync:
    """The store writes a file, makes sure of it, and renames it: hold a bag in the middle of that."""

    def __init__(self, settings: Settings, name: str) -> None:
        self._settings, self._name = settings, name

    def __enter__(self) -> None:
        self._fsync = os.fsync

        def fsync(file: Any) -> None:
            gate(self._settings, self._name, "store")
            self._fsync(file)

        os.fsync = fsync  # type: ignore[assignment]

    def __exit__(self, *_: object) -> None:
        os.fsync = self._fsync


def prepare(context: tasks.WorkerContext) -> None:
    """What a worker of the tests computes with."""
    if os.environ.get("WSC_REAL_MODEL"):
        _little_memory(context.settings)
        return
    context.load_engine = lambda _settings, _device: "NumPy"
    context.analyser = analyse
    kill_at = os.environ.get("WSC_KILL_AT_COMMAND")
    if kill_at:
        _die_at_command(int(kill_at))


def _little_memory(settings: Settings) -> None:
    """The real model; a batch of more tiles than the file ``do/memory-for-tiles`` says is out of device memory."""
    import torch

    from backend.inference.engine import Engine

    latents = Engine.latents

    def guarded(self: Any, pixels: Any) -> Any:
        if len(pixels) > int((settings.model_dir / "do" / "memory-for-tiles").read_text()):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return latents(self, pixels)

    Engine.latents = guarded  # type: ignore[method-assign]


def _die_at_command(number: int) -> None:
    """Kill this process just before its main thread's ``number``-th message to Redis after taking its first job."""
    from redis.connection import AbstractConnection

    send, next_job = AbstractConnection.send_packed_command, bag_worker.BagWorker._next_job
    left = None

    def taking(self: Any) -> Any:
        nonlocal left
        found = next_job(self)
        if found is not None and left is None:
            left = number
        return found

    def counting(self: Any, command: Any, check_health: bool = True) -> Any:
        nonlocal left
        if left is not None and threading.current_thread() is threading.main_thread():
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return send(self, command, check_health)

    bag_worker.BagWorker._next_job = taking
    AbstractConnection.send_packed_command = counting


def main() -> int:
    """The command named first, by the backend's own entry points."""
    apply_tweaks()
    if sys.argv[1] == "worker":
        return worker.main(sys.argv[2:], prepare=prepare)
    defaults = WorkerPool.__init__.__kwdefaults__
    defaults.update(command=WORKER, backoff_first_s=0.2)
    from backend.cli import main as command_line

    command_line()
    return 0


if __name__ == "__main__":
    sys.exit(main())
