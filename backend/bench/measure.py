"""Measuring: ways of doing the same thing side by side in one process, and the figures that come of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from backend.settings import Settings

Size = Literal["smallest", "quick", "full"]


@dataclass(frozen=True)
class Plan:
    """What a benchmark is given.

    Attributes
    ----------
    settings
        The user's; ``MODEL`` names the checkpoint, if any.
    device
        ``cpu``, ``cuda:0``.
    size
        ``full`` is what figures are quoted from, ``quick`` takes about a minute in all, ``smallest`` only proves that it runs.
    folder
        Scratch space of this run.
    """

    settings: Settings
    device: str
    size: Size
    folder: Path

    @property
    def rounds(self) -> int:
        """How often each way is timed, the warm-up not counted."""
        return {"smallest": 2, "quick": 5, "full": 7}[self.size]

    def pick(self, smallest: int, quick: int, full: int) -> int:
        """The number for this size."""
        return {"smallest": smallest, "quick": quick, "full": full}[self.size]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes
    ----------
    benchmark, name
        Which benchmark, and what of it.
    value, unit
        The figure, ``None`` where this machine has nothing to measure; the unit is empty for a ratio.
    target
        What it should be, in words, and ``met`` whether it is; empty and ``None`` where there is no target.
    note
        What a reader has to know to judge it.
    """

    benchmark: str
    name: str
    value: float | None
    unit: str = ""
    target: str = ""
    met: bool | None = None
    note: str = ""


def at_least(benchmark: str, name: str, value: float, bound: float, unit: str = "", note: str = "") -> Figure:
    """A figure whose target is to reach ``bound``."""
    return Figure(benchmark, name, value, unit, f">= {bound:g} {unit}".strip(), bool(value >= bound), note)


def below(benchmark: str, name: str, value: float, bound: float, unit: str = "", note: str = "") -> Figure:
    """A figure whose target is to stay below ``bound``."""
    return Figure(benchmark, name, value, unit, f"< {bound:g} {unit}".strip(), bool(value < bound), note)


@dataclass(frozen=True)
class Timings:
    """Seconds of each round for each way: round i of all ways was measured one right after the other."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, way: str) -> float:
        """Median seconds of a way."""
        return statistics.median(self.seconds[way])

    def speedup(self, way: str, over: str) -> float:
        """How many times faster ``way`` is: the median of the rounds' ratios, so that what slows a whole round down cancels."""
        pairs = zip(self.seconds[over], self.seconds[way], strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> Timings:
    """Time each way once in every round, after one round that is not counted. The order turns, so that none always goes first."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    order = list(ways)
    for run in ways.values():
        run()
    for _ in range(rounds):
        for way in order:
            started = time.perf_counter()
            ways[way]()
            seconds[way].append(time.perf_counter() - started)
        order.append(order.pop(0))
    return Timings(seconds)


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least ``percent`` % of ``values`` do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * percent // 100).__int__() - 1))]
