"""Which levels of a slide show what level 0 shows, and at what downsample. Pure but for the function that reads.

Readers take a level's size for its scale: a level that was filled up to whole tiles then drifts, more so the further
from the corner, and a macro picture that was marked as reduced becomes a level. So after a look at the sizes
(:mod:`backend.slides.level_fit`) the pixels of each level are compared with those of the next finer true one, and so in
the end with level 0, at a few places spread over the slide.

Only places with texture prove anything: glass looks the same anywhere. They are taken from the coarsest level, where
one read shows the whole slide, with some of its empty places, which prove it wrong if a finer level has tissue there;
where that is not enough, from samples of level 0.

How the thresholds were chosen: the brightness of 16 x 16 cells (32 x 32 pixels of the level) at all textured places of
two H&E pictures (CMU-1-Small-Region, histolytics' hgsc_nest), each level made from level 0 in one step. Correlation
with level 0, of the picture for which it is the nearer to the threshold: lowest and median of the places.

==========================================  ============  ============
level                                       factor 2      factor 16
==========================================  ============  ============
averaged, JPEG quality 95                   0.99   1.00   1.00   1.00
averaged, JPEG quality 30                   0.95   0.99   0.95   0.97
Lanczos, JPEG 75                            0.96   1.00   0.98   0.99
sharpened by 150 %, JPEG 75                 0.89   0.96   0.91   0.94
half a pixel beside, JPEG 75                0.82   0.93   0.82   0.86
nearest neighbour, JPEG 30                  0.89   0.97   0.69   0.77
blurred by sigma 2 (another focal plane)    0.62   0.87   0.64   0.72
shifted by 4 pixels                        -0.35   0.42  -0.03   0.60
shifted by 8 pixels                        -0.54   0.07  -0.07   0.29
mirrored, upside down, turned              -0.90   0.01  -0.26   0.20
==========================================  ============  ============

Nearest neighbour at factor 32 in one step has 0.51 and 0.56: the worst of the true ones. The mean colour of a true
place was off by 17 steps at most (sharpened); that of red and blue exchanged by 9 in the median, so orders are
compared instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from statistics import median

import numpy as np
import numpy.typing as npt

from backend.errors import SlideUnreadable
from backend.results.bag import UInt8Array
from backend.slides.colours import same_picture
from backend.slides.level_fit import LevelFit, Size

Point = tuple[float, float]  # in level-0 pixels
Float64Array = npt.NDArray[np.float64]

Read = Callable[[int, float, float, float, float, Size], UInt8Array]
"""(level, x, y, width, height, size): that part of a level, in its own pixels, as uint8 (h, w, 3) of ``size`` (w, h).

May raise :class:`~backend.errors.SlideUnreadable`: such a place proves nothing.
"""

TEXTURE = 5.0  # standard deviation of the brightness of a place's cells; noise and JPEG on glass stay below 3
_SAME = 0.45  # correlation: least median of a true level's places
_OTHER = 0.2  # correlation: one place below it proves a level false
_CLEARLY_SAME = 0.8  # correlation: if all places are above it, fewer of them do
_COLOUR = 24.0  # 8-bit steps: largest difference of a channel's mean
_REORDERED = 0.5  # the difference that another order of the channels leaves, as a part of the difference as it is
_NOTICED = 4.0  # 8-bit steps: mean difference below which no other order is looked for

_PROBE_PX, _PROBE_LEAST_PX = 32, 16  # edge of a place in pixels of the level
_FINE_PX = 512  # edge that is read of the finer level, where the place need not be smaller than the least for it
_FAR = 8.0  # times finer: a level further from level 0 is compared with one between them, of which less must be read
_PLACES, _CLEAR_PLACES = 4, 3  # that prove something, wanted for each level
_FLAT_PLACES = 3  # without texture, looked at in the level by which places are chosen
_ENOUGH = 2  # with fewer, level 0 is sampled for more
_RESERVE = 4  # for places that cannot be read or prove nothing
_GUIDE_LEAST_PX = 2**16  # smaller levels have too few places
_WHOLE_PX = 2**21  # levels of up to so many pixels are looked over whole
_SAMPLES = 6  # along each side, of a level that is too large for that
_GIVE_UP = 4  # reads that failed, before a level counts as unreadable


@dataclass(frozen=True)
class Verdict:
    """What a level is: ``fit`` is ``None`` and ``reason`` says why, in words, if it is not to be used."""

    fit: LevelFit | None
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two readings of one place.

    Attributes
    ----------
    correlation
        Of the brightness of their cells, -1 to 1; ``None`` if neither has texture.
    colour
        Largest difference of a channel's mean, in 8-bit steps.
    cells
        int16 (2, n, n, 3): both readings.
    empty
        Whether the level has one colour where the finer one has texture or another colour.
    """

    correlation: float | None
    colour: float
    cells: npt.NDArray[np.int16]
    empty: bool


def compare(coarse: UInt8Array, fine: UInt8Array) -> Comparison | None:
    """Compare two readings (n, n, 3) of one place; ``None`` if they prove nothing.

    That is so where both are flat and alike, and where the finer one has no pixels but one colour.
    """
    if (fine == fine[0, 0]).all():
        return None  # a hole of the scan, filled with one colour
    cells = np.stack([coarse, fine]).astype(np.int16)
    bright, true_bright = cells.mean(axis=3)
    spread, true_spread = float(bright.std()), float(true_bright.std())
    ours, theirs = cells.mean(axis=(1, 2))
    colour = float(np.abs(ours - theirs).max())
    correlation = None
    if max(spread, true_spread) >= TEXTURE:
        product = float(((bright - bright.mean()) * (true_bright - true_bright.mean())).mean())
        correlation = product / (spread * true_spread) if min(spread, true_spread) > 1e-6 else 0.0
    elif same_picture(coarse, fine):
        return None
    return Comparison(correlation, colour, cells, empty=spread < 1 and (true_spread >= TEXTURE or colour > _COLOUR))


def contradiction(places: Sequence[Comparison]) -> str:
    """Why the level of these places is false, in words; empty if nothing speaks against it."""
    if not places:
        return ""
    if all(place.empty for place in places):
        return "it is empty where level 0 is not"
    correlations = [place.correlation for place in places if place.correlation is not None]
    if correlations and (median(correlations) < _SAME or min(correlations) < _OTHER):
        return "it does not show what level 0 shows at the same places"
    cells = np.concatenate([place.cells.reshape(2, -1, 3) for place in places], axis=1)
    difference = _difference(cells, (0, 1, 2))
    if difference > _NOTICED and any(_difference(cells, o) < _REORDERED * difference for o in permutations(range(3))):
        return "its colour channels are in another order than those of level 0"
    if median(place.colour for place in places) > _COLOUR or any(place.correlation is None for place in places):
        return "its colours are not those of level 0"
    return ""


def _difference(cells: npt.NDArray[np.int16], order: tuple[int, ...]) -> float:
    return float(np.abs(cells[0][:, order] - cells[1]).mean())


class LevelCheck:
    """Judges the levels of one slide when they are asked for. Not for several threads at once.

    Parameters
    ----------
    read
        Reads a part of a level as the file has it.
    fits
        Of each level the :func:`~backend.slides.level_fit.possible_fits`; level 0, the first, has one and is true.
    tiles
        (width, height) of the file's tiles in each level, where they are known: places are chosen so that few are
        decoded.
    """

    def __init__(self, read: Read, fits: Sequence[Sequence[LevelFit]], tiles: Sequence[Size | None]) -> None:
        self._read, self._fits, self._tiles = read, fits, tiles
        self._full = fits[0][0].size
        self._verdicts = {0: Verdict(fits[0][0])}
        self._looked = False
        self._places: list[Point] = []
        self._samples: list[Point] | None = None

    @property
    def verdicts(self) -> Mapping[int, Verdict]:
        """Of the levels that were judged by now."""
        return self._verdicts

    def judge(self, level: int) -> None:
        """Judge a level, and others if it takes them to judge it.

        One that cannot be judged (no texture anywhere, or not readable there) is believed if its sizes fit without
        filling.
        """
        if not self._looked:
            self._looked = True
            self._find_places(level)
        self._judge(level)

    def _find_places(self, asked: int) -> None:
        """Take the places with texture of a true level that is small, but large enough to show them."""
        whole = [i for i, fits in enumerate(self._fits) if i and fits and fits[0].how == "whole"]

        def suits(level: int) -> tuple[bool, bool, float]:
            fit = self._fits[level][0]
            pixels = fit.size[0] * fit.size[1]
            # What is asked for will be read in any case.
            return level == asked and _GUIDE_LEAST_PX <= pixels <= _WHOLE_PX, pixels >= _GUIDE_LEAST_PX, fit.downsample

        for level in sorted(whole, key=suits, reverse=True):
            seen = _look_over(self._read, level, self._fits[level][0])
            if seen is None:
                self._verdicts[level] = Verdict(None, "it cannot be read")
                continue
            self._places = seen.textured(self._full)
            self._judge(level, seen.flat(self._full, self._places))
            if self._verdicts[level].fit is not None:
                return
        self._places = []

    def _judge(self, level: int, flat: Sequence[Point] = ()) -> None:
        if level in self._verdicts:
            return
        reason = "" if self._fits[level] else "its shape is not that of the slide: it may be a macro picture or a label"
        best: tuple[float, LevelFit] | None = None
        for fit in self._fits[level]:
            evidence = self._evidence(level, fit, flat)
            reason = (
                reason or evidence.reason or "its size does not fit the slide, and it has no texture to be compared"
            )
            if evidence.reason or (not evidence.proven and fit.how == "padded"):
                continue
            if best is None or evidence.agreement > best[0]:
                best = (evidence.agreement, fit)
            if fit.how == "whole":
                break
        self._verdicts[level] = Verdict(best[1]) if best else Verdict(None, reason)

    def _evidence(self, level: int, fit: LevelFit, flat: Sequence[Point]) -> _Evidence:
        finer = self._finer(fit.downsample)
        evidence = _Evidence(self._read, (level, fit), finer, self._full, self._tiles[finer[0]])
        evidence.take(self._places)
        evidence.take(flat, all_of_them=True)
        evidence.take(_beyond(fit, self._full), all_of_them=True)
        if evidence.proven < _ENOUGH and not evidence.reason:
            evidence.take(self._sampled())
        return evidence

    def _finer(self, downsample: float) -> tuple[int, LevelFit]:
        """A true level to compare with: level 0, or the finest that is near enough."""
        if downsample > _FAR:
            near = [
                i
                for i, fits in enumerate(self._fits)
                if fits and fits[0].how == "whole" and 2 <= downsample / fits[0].downsample <= _FAR
            ]
            for level in sorted(near, key=lambda i: self._fits[i][0].downsample):
                self._judge(level)
                fit = self._verdicts[level].fit
                if fit is not None:
                    return level, fit
        return 0, self._fits[0][0]

    def _sampled(self) -> list[Point]:
        """Places of level 0 with texture, looked for once."""
        if self._samples is None:
            seen = _look_over(self._read, 0, self._fits[0][0])
            self._samples = seen.textured(self._full) if seen is not None else []
        return self._samples


class _Evidence:
    """What the places of a level say of it, taken for one of downsample ``fit.downsample``, beside a finer one."""

    def __init__(
        self, read: Read, level: tuple[int, LevelFit], finer: tuple[int, LevelFit], full: Size, tile: Size | None
    ) -> None:
        self._read = read
        self._level, self._fit = level
        self._finer, self._finer_fit = finer
        self._full = full
        self._tile = tile
        self._places: list[Comparison] = []
        self.reason = ""

    @property
    def _correlations(self) -> list[float]:
        return [place.correlation for place in self._places if place.correlation is not None]

    @property
    def proven(self) -> int:
        """Number of places that have texture."""
        return len(self._correlations)

    @property
    def agreement(self) -> float:
        """Median of the correlations; -1 without any."""
        return median(self._correlations or [-1.0])

    def take(self, centres: Sequence[Point], *, all_of_them: bool = False) -> None:
        """Look at places until one speaks against the level or, without ``all_of_them``, enough have proven something.

        With ``all_of_them`` they are small: what is asked is only whether something is there.
        """
        for x, y in centres:
            if self.reason or (not all_of_them and self._enough()):
                return
            try:
                place = self._look(x, y, 2 if all_of_them else 1)
            except SlideUnreadable:
                continue
            if place is not None:
                self._places.append(place)
                self.reason = contradiction(self._places)

    def _enough(self) -> bool:
        wanted = _PLACES if min(self._correlations, default=0.0) < _CLEARLY_SAME else _CLEAR_PLACES
        return self.proven >= wanted

    def _look(self, x: float, y: float, part: int) -> Comparison | None:
        """Compare a place of one ``part``-th of the ordinary edge."""
        ratio = self._fit.downsample / self._finer_fit.downsample
        edge = min(_PROBE_PX // part, max(_PROBE_LEAST_PX // part, int(_FINE_PX / part / ratio)), *self._fit.size)
        if edge < 4:
            return None
        cells = edge // 2 if edge >= _PROBE_LEAST_PX else edge
        left, top = (self._start(axis, centre, edge, ratio) for axis, centre in enumerate((x, y)))
        coarse = self._read(self._level, left, top, edge, edge, (cells, cells))
        fine = self._read(self._finer, left * ratio, top * ratio, edge * ratio, edge * ratio, (cells, cells))
        return compare(coarse, fine)

    def _start(self, axis: int, centre: float, edge: int, ratio: float) -> int:
        """Where a place around ``centre`` begins, in pixels of the level, to lie within few tiles of the finer one."""
        ds = self._fit.downsample
        start = round(centre / ds - edge / 2)
        if self._tile is not None:
            tile, fine = self._tile[axis], edge * ratio
            first = centre / self._finer_fit.downsample // tile * tile
            last = max(first, first + tile - fine)
            start = math.ceil(min(max(start * ratio, first), last) / ratio)
        return max(0, min(start, math.floor(self._full[axis] / ds) - edge))


class _Look:
    """Where a level has texture: centres of places in level-0 pixels, standard deviations of their brightness."""

    def __init__(self, centres: Sequence[Point], spreads: Sequence[float] | Float64Array) -> None:
        self._centres = np.asarray(centres, np.float64).reshape(-1, 2)
        self._spreads = np.asarray(spreads, np.float64)

    def textured(self, full: Size) -> list[Point]:
        """Places with much texture, far from each other and from the corner, where drift would not show."""
        weights = np.where(self._spreads >= TEXTURE, np.minimum(self._spreads, 4 * TEXTURE), 0)
        return _spread(self._centres, weights, [(0.0, 0.0)], _PLACES + _RESERVE, full)

    def flat(self, full: Size, textured: Sequence[Point]) -> list[Point]:
        """Places without texture, far from each other and from those with it."""
        weights = (self._spreads < TEXTURE).astype(np.float64)
        return _spread(self._centres, weights, textured, _FLAT_PLACES, full)


def _spread(
    centres: Float64Array, weights: Float64Array, taken: Sequence[Point], count: int, full: Size
) -> list[Point]:
    """Up to ``count`` of the centres, each that whose weight times its distance to the nearest taken is largest."""
    chosen: list[Point] = []
    distance = np.full(len(centres), math.hypot(*full))
    for x, y in taken:
        distance = np.minimum(distance, np.hypot(centres[:, 0] - x, centres[:, 1] - y))
    while len(chosen) < count and len(centres) and (weights * distance).max() > 0:
        best = int(np.argmax(weights * distance))
        x, y = centres[best]
        chosen.append((float(x), float(y)))
        distance = np.minimum(distance, np.hypot(centres[:, 0] - x, centres[:, 1] - y))
    return chosen


def _look_over(read: Read, level: int, fit: LevelFit) -> _Look | None:
    """A level's places and their texture; ``None`` if it cannot be read."""
    width, height = fit.size
    edge = min(_PROBE_PX, width // 2 * 2, height // 2 * 2)
    if edge < 4:
        return _Look([], [])
    half = edge // 2
    if width * height <= _WHOLE_PX:
        columns, rows = width // edge, height // edge
        try:
            whole = read(level, 0, 0, columns * edge, rows * edge, (columns * half, rows * half))
        except SlideUnreadable:
            pass  # some of it may be readable
        else:
            spreads = whole.mean(axis=2).reshape(rows, half, columns, half).std(axis=(1, 3))
            places = [(x * edge, y * edge) for y in range(rows) for x in range(columns)]
            return _Look(_centres(places, edge, fit), spreads.ravel())
    xs, ys = (sorted({round(i * (n - edge) / (_SAMPLES - 1)) for i in range(_SAMPLES)}) for n in (width, height))
    places, spreads, failed = [], [], 0
    for x, y in product(xs, ys):
        try:
            spreads.append(float(read(level, x, y, edge, edge, (half, half)).mean(axis=2).std()))
            places.append((x, y))
        except SlideUnreadable:
            failed += 1
            if failed >= _GIVE_UP and not places:
                return None
    return _Look(_centres(places, edge, fit), spreads)


def _centres(places: Sequence[tuple[int, int]], edge: int, fit: LevelFit) -> list[Point]:
    return [((x + edge / 2) * fit.downsample, (y + edge / 2) * fit.downsample) for x, y in places]


def _beyond(fit: LevelFit, full: Size) -> list[Point]:
    """Where level 0 goes on beyond the end of a level: that must be filling of level 0, not tissue."""
    width, height = (n * fit.downsample for n in fit.size)
    parts = (0.125, 0.375, 0.625, 0.875)
    points: list[Point] = []
    if full[0] - width > 2 * fit.downsample:
        points += [((width + full[0]) / 2, part * full[1]) for part in parts]
    if full[1] - height > 2 * fit.downsample:
        points += [(part * full[0], (height + full[1]) / 2) for part in parts]
    return points
