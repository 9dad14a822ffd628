"""``wsc-backend bench``: runs the chosen benchmarks one after the other."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from backend.bench.measure import Figure, Plan, Size
from backend.errors import SettingsError
from backend.settings import Settings

log = logging.getLogger(__name__)

BENCHMARKS = ("encoder", "numerics", "decode", "slide", "answers", "publish", "pictures", "learning", "growth", "start")
"""In the order in which they run; each is a module of :mod:`backend.bench` with a function ``run``."""


def chosen(only: str) -> tuple[str, ...]:
    """The benchmarks named in ``only``, separated by commas; all for an empty text.

    Raises
    ------
    SettingsError
        There is none of a name.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise SettingsError(
            f"There is no benchmark {', '.join(map(repr, unknown))}.", hint=f"There are: {', '.join(BENCHMARKS)}."
        )
    return tuple(name for name in BENCHMARKS if name in names) if names else BENCHMARKS


def run_benchmarks(
    names: Sequence[str],
    settings: Settings,
    device: str,
    size: Size,
    *,
    scratch: Path | None = None,
    on_start: Callable[[str], None] = lambda _: None,
    on_end: Callable[[str, Sequence[Figure], Exception | None], None] | None = None,
) -> list[Figure]:
    """Run benchmarks in a scratch folder that is removed afterwards, and return all their figures.

    Parameters
    ----------
    scratch
        Where that folder is made; the system's folder for temporary files by default. Needs about 2 GB for the full size.
    on_start
        Called with the name of each benchmark.
    on_end
        Called with the name of each benchmark that has ended, all figures so far, and what it raised. With it, one that fails does not end the
        others; without it, its error is raised.
    """
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="wsc-bench-", dir=scratch) as folder:
        plan = Plan(settings, device, size, Path(folder))
        for name in names:
            on_start(name)
            failure: Exception | None = None
            try:
                figures += import_module(f"backend.bench.{name}").run(plan)
            except Exception as error:
                if on_end is None:
                    raise
                log.exception("the benchmark %s failed", name)
                failure = error
            if on_end is not None:
                on_end(name, figures, failure)
    return figures
