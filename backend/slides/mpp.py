"""µm per pixel: what is believed, and what is not. One place, because readers, tasks and settings must agree."""

from __future__ import annotations

import math

from backend.errors import MppUnknown

MPP_MIN = 0.05
MPP_MAX = 5.0


def plausible_mpp(value: float) -> bool:
    """Whether ``value`` (µm per pixel) can be the scale of a microscope's image: 0.05 to 5, so neither 0.0, 1000 nor NaN."""
    return math.isfinite(value) and MPP_MIN <= value <= MPP_MAX


def check_task_mpp(value: float) -> float:
    """``value`` itself, or :class:`~backend.errors.MppUnknown` if a task states a scale that cannot be."""
    if not plausible_mpp(value):
        raise MppUnknown(
            f"The task says mpp = {value:g} µm per pixel, which lies outside {MPP_MIN:g} to {MPP_MAX:g}.",
            hint="Correct the task's `mpp`, or remove it if the slide states its own scale.",
        )
    return value
