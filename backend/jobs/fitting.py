"""Which jobs a worker takes, and what is said of those that it leaves to a worker with another model or other settings."""

from __future__ import annotations

import json
import logging
import time

from backend.errors import BackendError, ModelMismatch
from backend.jobs.tasks import Fit, WorkerContext
from backend.settings import Settings

log = logging.getLogger(__name__)

TELL_EVERY_S = 60.0


class Fitting:
    """What one worker fits.

    Attributes
    ----------
    fit
        Its model and settings; empty, so that it takes every job, until :meth:`find` has found them.
    meta
        What is noted of a job that it does not fit, JSON text in the form of a job's ``meta``: no failure, it ends when a worker comes that fits.
    """

    def __init__(self, worker: str, settings: Settings) -> None:
        self._worker = worker
        self._settings = settings
        self._tell_from = 0.0
        self.fit = Fit()
        self.meta = "{}"

    def find(self, context: WorkerContext) -> None:
        """Find out what the worker fits. Where that cannot be told it takes every job, so that each fails with the reason where its user sees it."""
        try:
            self.fit = context.fit()
        except (BackendError, OSError) as error:
            log.error("worker %s: which model is used cannot be told: %s", self._worker, error)
        settings = self._settings
        unfit = ModelMismatch(
            f"It waits for a worker with the model and settings of the backend: {self._worker} has {self.fit.model_version}, "
            f"{settings.tile_px} px at {settings.tile_mpp} µm/px.",
            hint="Give backend and workers the same MODEL, PRECISION, DEFAULT_MPP, TILE_… and TISSUE_…, and restart those that are wrong.",
        )
        self.meta = json.dumps({"error": unfit.as_dict()})

    def tell(self, count: int) -> None:
        """Say in the log, once a minute, that so many jobs were left."""
        at = time.monotonic()
        if at < self._tell_from:
            return
        self._tell_from = at + TELL_EVERY_S
        what = "%d jobs need another model or other settings than %s has; they wait for a worker that fits"
        log.warning(f"worker %s: {what}", self._worker, count, self.fit.model_version)
