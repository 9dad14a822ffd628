"""In which ways a level may belong to a slide, by the sizes alone, in x and y apart. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Size = tuple[int, int]

_ANISOTROPY = 1.02  # of sizes that are no exact fit: levels of old formats are a few pixels off
_TILE_SIZES = (4096, 2048, 1024, 512, 256, 240, 128, 64)  # that are looked for where a file does not state its own
_MAX_FACTORS = 64


@dataclass(frozen=True)
class LevelFit:
    """A way in which a level may belong to a slide.

    Attributes
    ----------
    downsample
        Level-0 pixels for one of its pixels.
    size
        (width, height) of what belongs to the slide, in pixels of the level.
    how
        ``"whole"``: level 0 divided by a whole number, cut or filled up to whole pixels. ``"ratio"``: the ratio of the
        sizes. ``"padded"``: a whole number, and this level or level 0 was filled up to whole tiles.
    """

    downsample: float
    size: Size
    how: Literal["whole", "ratio", "padded"]


def possible_fits(
    full: Size, level: Size, stated: float, full_tile: Size | None = None, tile: Size | None = None
) -> list[LevelFit]:
    """How a level of size ``level`` may belong to a slide of size ``full``, likeliest first; empty: it does not.

    Parameters
    ----------
    stated
        The downsample as the reader states it.
    full_tile, tile
        Sizes of the file's tiles in level 0 and in the level, where it states them.
    """
    fits = []
    whole = round(stated)
    ratios = [f / n for f, n in zip(full, level, strict=True)]
    if whole >= 1 and all(abs(f / whole - n) < 1 for f, n in zip(full, level, strict=True)):
        # Readers compute the downsample from the sizes, so that 2967 / 1483 becomes 2.0007; over a wide slide that is a
        # drift.
        fits.append(LevelFit(float(whole), level, "whole"))
    elif stated >= 1 and max(ratios) <= _ANISOTROPY * min(ratios):
        fits.append(LevelFit(float(stated), level, "ratio"))
    axes = [_Axis.of(full[i], level[i], full_tile[i] if full_tile else None, tile[i] if tile else None) for i in (0, 1)]
    low, high = max(axis.lowest for axis in axes), min(axis.highest for axis in axes)
    factors = [f for f in range(max(2, math.ceil(low)), math.floor(high) + 1) if all(axis.fits(f) for axis in axes)]
    # Few pyramids are made with other factors than powers of two. The last whole pixel may be partly filling.
    for factor in sorted(factors, key=lambda f: (f & (f - 1) != 0, f))[:_MAX_FACTORS]:
        if not fits or fits[0].how != "whole" or factor != whole:
            size = (max(1, min(level[0], full[0] // factor)), max(1, min(level[1], full[1] // factor)))
            fits.append(LevelFit(float(factor), size, "padded"))
    return fits


@dataclass(frozen=True)
class _Axis:
    """Width or height: of level 0, of it without filling, of the level, and what the level may hold of filling."""

    full: int
    least: int
    level: int
    filling: int

    @classmethod
    def of(cls, full: int, level: int, full_tile: int | None, tile: int | None) -> _Axis:
        return cls(full, full - _filling(full, full_tile), level, _filling(level, tile))

    @property
    def lowest(self) -> float:
        return self.least / (self.level + 1)

    @property
    def highest(self) -> float:
        rest = self.level - self.filling - 1
        return self.full / rest if rest > 0 else float(self.full)

    def fits(self, factor: int) -> bool:
        return self.least / factor - 1 < self.level < self.full / factor + max(1, self.filling)


def _filling(length: int, tile: int | None) -> int:
    """How many pixels of a length may be filling: less than a tile if it is whole tiles, else none."""
    if tile is None:
        tile = next((size for size in _TILE_SIZES if length % size == 0), 1)
    return tile - 1 if tile > 0 and length % tile == 0 else 0
