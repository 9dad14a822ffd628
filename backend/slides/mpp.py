"""µm per pixel: what a file states, what is believed, and what is not. One place, because readers, tasks and settings
must agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from backend.errors import MppUnknown, SlideUnreadable

MPP_MIN = 0.05
MPP_MAX = 5.0

SAME_WITHIN = 0.01  # two statements that differ by less are one, rounded differently
_MAX_ANISOTROPY = 0.05


@dataclass(frozen=True)
class Scale:
    """What a file states about the size of its pixels.

    Attributes
    ----------
    xy
        µm per level-0 pixel in x and y, believed or not; ``None`` if nothing is stated, or nothing that can be read.
    unread
        What stands where the scale should and is none, in words: ``"MPP = abc in Aperio's text"``; empty if nothing
        does.
    notes
        Sentences about statements that contradict each other.
    """

    xy: tuple[float, float] | None = None
    unread: str = ""
    notes: tuple[str, ...] = ()

    @property
    def plausible(self) -> bool:
        """Whether both numbers can be a microscope's."""
        return self.xy is not None and all(plausible_mpp(v) for v in self.xy)

    @property
    def square(self) -> bool:
        """Whether x and y differ by 5 % at most."""
        return self.xy is not None and abs(self.xy[0] - self.xy[1]) <= _MAX_ANISOTROPY * min(self.xy)

    @property
    def mpp(self) -> float | None:
        """The mean of x and y where both are plausible and the pixels square."""
        return sum(self.xy) / 2 if self.xy is not None and self.plausible and self.square else None

    @property
    def in_words(self) -> str:
        """``"0.499 x 0.499 µm per pixel"``, ``"no scale"``, or what stands there and cannot be read."""
        if self.xy is not None:
            return f"{self.xy[0]:.4g} x {self.xy[1]:.4g} µm per pixel"
        return f"a scale that cannot be read ({self.unread})" if self.unread else "no scale"

    def turned(self) -> Scale:
        """The same with x and y swapped."""
        return Scale(self.xy and (self.xy[1], self.xy[0]), self.unread, self.notes)

    def check_square(self, name: str) -> None:
        """Raise :class:`~backend.errors.SlideUnreadable` if plausible numbers are stated and pixels are not square."""
        if self.xy is not None and self.plausible and not self.square:
            raise SlideUnreadable(
                f"The pixels of {name} are not square: {self.xy[0]:.4g} x {self.xy[1]:.4g} µm.",
                hint="Tiles would be distorted. Resample it; or, if the file is wrong and they are square, force its "
                "scale: `mpp` with `mpp_override: true` in the task, or --mpp with --force.",
            )


def plausible_mpp(value: float) -> bool:
    """Whether ``value`` (µm per pixel) can be the scale of a microscope's image: 0.05 to 5, so neither 0.0, 1000 nor NaN."""
    return math.isfinite(value) and MPP_MIN <= value <= MPP_MAX


def same_mpp(first: float, second: float) -> bool:
    """Whether two scales differ by 1 % at most."""
    return abs(first - second) <= SAME_WITHIN * min(first, second)


def check_task_mpp(value: float) -> float:
    """``value`` itself, or :class:`~backend.errors.MppUnknown` if a task states a scale that cannot be."""
    if not plausible_mpp(value):
        raise MppUnknown(
            f"The task says mpp = {value:g} µm per pixel, which lies outside {MPP_MIN:g} to {MPP_MAX:g}.",
            hint="Correct the task's `mpp`, or remove it if the slide states its own scale.",
        )
    return value


def given_scale_note(stated: Scale, given: float, *, forced: bool) -> str:
    """What is to be said about a scale that a task or a command line gives beside what the slide states; empty if they
    agree.

    ``given`` is µm per pixel; ``forced``: it holds whatever the slide states.
    """
    own = stated.mpp
    if own is not None and same_mpp(own, given):
        return ""
    if forced:
        return (
            f"The scale was forced to {given:g} µm per pixel; the slide states {stated.in_words}." if stated.xy else ""
        )
    if own is not None:
        return (
            f"The given scale of {given:g} µm per pixel is not used: the slide states {stated.in_words}. "
            "If the slide is wrong, force it: `mpp_override: true` in the task, or --force beside --mpp."
        )
    if stated.xy is not None or stated.unread:
        return (
            f"The given scale of {given:g} µm per pixel is used: the slide states {stated.in_words}, "
            "which is not believed."
        )
    return ""
