"""From an open slide to its bag: scale, grid, tissue, and the choice of tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from backend.errors import MppUnknown, NoTissue, SettingsError, SlideTooCoarse, SlideTooSmall, TaskFieldMissing
from backend.paths import StrPath
from backend.results.bag import Bag, MppSource
from backend.results.tissue_record import INK, TissueRecord
from backend.settings import Settings
from backend.slides.grid import Grid, tissue_fractions
from backend.slides.mpp import MPP_MAX, MPP_MIN, check_task_mpp, given_scale_note
from backend.slides.reader import Slide
from backend.slides.tissue import TissueMap, find_tissue
from backend.slides.tissue_file import read_tissue_file

__all__ = ["Grid", "locate_tissue", "make_bag", "patches_bag", "slide_grid", "slide_mpp", "tissue_fractions"]

# Level 0 may be so much coarser than a tile. Beyond it tiles would be made of enlarged pixels.
MAX_ENLARGEMENT = 1.5
_OVERVIEW_MAX_PX = 20_000
_INK_SAID, _STAIN = 0.001, 0.5


def slide_mpp(
    slide: Slide, settings: Settings, *, task_mpp: float | None, mpp_override: bool = False
) -> tuple[float, MppSource]:
    """µm per level-0 pixel, and who said so: the slide, else the task, else ``DEFAULT_MPP``; with ``mpp_override`` the task before the slide.

    Raises
    ------
    MppUnknown
        None of them says it, or the task says something impossible (even if the slide knows better: the task is wrong then).
    SlideUnreadable
        The slide says that its pixels are not square, and no scale is forced.
    """
    if task_mpp is not None:
        check_task_mpp(task_mpp)
    if task_mpp is not None and mpp_override:
        return task_mpp, "forced"
    slide.scale.check_square("the slide")
    if slide.mpp is not None:
        return slide.mpp, "slide"
    if task_mpp is not None:
        return task_mpp, "task"
    if settings.default_mpp is not None:
        return settings.default_mpp, "default"
    doubt = f", which is not believed ({MPP_MIN:g} to {MPP_MAX:g} are)" if slide.scale.xy is not None else ""
    raise MppUnknown(
        f"How large a pixel is, is not known: the slide states {slide.mpp_stated}{doubt}.",
        hint="Put `mpp` (µm per pixel, such as 0.5) into the task's data, or set DEFAULT_MPP if all your slides share one scale.",
    )


def slide_grid(
    slide: Slide, settings: Settings, *, task_mpp: float | None, mpp_override: bool = False
) -> tuple[Grid, float, MppSource]:
    """The grid of all tiles, tissue or not, with the slide's µm per level-0 pixel and who said so. Reads no pixels.

    Raises
    ------
    SlideTooSmall
        A side is shorter than one tile.
    MppUnknown, SlideUnreadable
        As :func:`slide_mpp`.
    SlideTooCoarse
        Level 0 is more than 1.5 times coarser than ``TILE_MPP``.
    """
    if min(slide.size) < 0.99 * settings.tile_px / MAX_ENLARGEMENT:
        # Too small at any scale that would be accepted, so this is said first, even where the scale is unknown.
        raise _too_small(slide, settings.tile_px / MAX_ENLARGEMENT, settings)
    mpp, source = slide_mpp(slide, settings, task_mpp=task_mpp, mpp_override=mpp_override)
    if mpp > MAX_ENLARGEMENT * settings.tile_mpp:
        said_by = "forced" if source == "forced" else f"by the {source}"
        raise SlideTooCoarse(
            f"The slide has {mpp:g} µm per pixel ({said_by}), and tiles need {settings.tile_mpp:g}.",
            hint="Scan it at a higher magnification, or set TILE_MPP to the slide's scale if the model was trained at it.",
        )
    edge = settings.tile_px * settings.tile_mpp / mpp
    # 1 % of grace: a 224-pixel image at 0.499 µm per pixel is one tile.
    if min(slide.size) < 0.99 * edge:
        raise _too_small(slide, edge, settings)
    return Grid.covering(slide.size, edge), mpp, source


def make_bag(
    slide: Slide,
    settings: Settings,
    *,
    task_mpp: float | None,
    mpp_override: bool = False,
    tissue_file: StrPath | None = None,
) -> Bag:
    """Choose the tiles of a slide, row by row. ``tissue_file``: a mask that is used in place of what would be found.

    A tile belongs to the bag if at least ``TISSUE_MIN_FRACTION`` of its full area is tissue; what sticks out of the slide is not tissue.

    Raises
    ------
    SlideTooSmall, MppUnknown, SlideTooCoarse
        As :func:`slide_grid`.
    NoTissue
        No tile has enough tissue; the message says how much there is, and what was taken as ink.
    TissueMaskInvalid
        ``tissue_file`` cannot be used.
    """
    grid, mpp, source = slide_grid(slide, settings, task_mpp=task_mpp, mpp_override=mpp_override)
    given = given_scale_note(slide.scale, task_mpp, forced=mpp_override) if task_mpp is not None else ""
    found, record, notes = locate_tissue(slide, settings, mpp, tissue_file)
    fractions = tissue_fractions(found.tissue, grid)
    rows, columns = np.nonzero(fractions >= settings.tissue_min_fraction - 1e-9)
    if not len(rows):
        raise _no_tissue(found, float(fractions.max()), record.source, settings)
    cells = np.stack([columns, rows], axis=1).astype(np.int64)
    return Bag(
        kind="slide",
        coords=grid.coords_of(cells),
        grid=cells,
        grid_size=(grid.columns, grid.rows),
        tile_size_level0=grid.tile_size_level0,
        slide_size=slide.size,
        tile_px=settings.tile_px,
        tile_mpp=settings.tile_mpp,
        mpp=mpp,
        mpp_source=source,
        bounds=slide.bounds,
        notes=(*slide.notes, *((given,) if given else ()), *notes),
        tissue=record,
    )


def locate_tissue(
    slide: Slide, settings: Settings, mpp: float, tissue_file: StrPath | None = None
) -> tuple[TissueMap, TissueRecord, tuple[str, ...]]:
    """Where the tissue of a slide is, the record of it that is kept, and what is to be said of it.

    Parameters
    ----------
    mpp
        µm per level-0 pixel.
    tissue_file
        A mask that is used in place of what would be found.

    Raises
    ------
    TissueMaskInvalid
        It cannot be used.
    """
    long_side = math.ceil(max(slide.size) * mpp / settings.tissue_mpp)
    if min(long_side, max(slide.size)) > _OVERVIEW_MAX_PX:
        raise SettingsError(
            f"TISSUE_MPP = {settings.tissue_mpp:g} would need an overview of {long_side} pixels for this slide.",
            hint="Use about 8 µm per pixel.",
        )
    if tissue_file is None:
        overview = slide.overview(long_side)
        found = find_tissue(
            overview, max(slide.size) * mpp / max(overview.shape[:2]), pen_rules=settings.tissue_pen_rules
        )
        del overview
        source, notes = "found", _notes(found)
    else:
        scale = max(1.0, max(slide.size) / long_side)
        shape = max(1, round(slide.size[1] / scale)), max(1, round(slide.size[0] / scale))
        given = read_tissue_file(tissue_file, slide.size, shape, slide.bounds)
        found = TissueMap(given.mask.astype(np.uint8))
        source, notes = Path(tissue_file).name, (given.note,)
    record = TissueRecord.of_labels(found.labels, source, found.tissue_share, found.ink_share)
    return found, record, notes


def _notes(found: TissueMap) -> tuple[str, ...]:
    notes = []
    if found.ink_share >= _INK_SAID:
        notes.append(
            f"{found.ink_share:.1%} of what is not glass on the slide was taken as pen ink and left out "
            f"({np.count_nonzero(found.labels == INK) / found.labels.size:.1%} of the slide)."
        )
    if found.like_ink >= _STAIN:
        notes.append(
            "Most of the tissue has the hue of blue, green or red ink, and the texture of tissue: that was taken for its "
            "stain and kept."
        )
    return tuple(notes)


def _no_tissue(found: TissueMap, fullest: float, source: str, settings: Settings) -> NoTissue:
    message = (
        f"No tissue: it covers {100 * found.tissue_share:.1f} % of the slide, and no tile has "
        f"{100 * settings.tissue_min_fraction:g} % (the fullest has {100 * fullest:.1f} %)."
    )
    own = "give it as a mask (`NAME.tissue.geojson` or `NAME.tissue.png` beside the slide)"
    ink = np.count_nonzero(found.labels == INK) / found.labels.size
    if source != "found":
        hint = f"The mask {source} marks too little for a tile. Draw more of the slide, or remove the mask."
    elif ink > found.tissue_share:
        message += (
            f" What is coloured is {100 * ink:.1f} % of the slide, as even as pen marks are, and was taken as ink."
        )
        hint = f"Look at it with `wsc-backend doctor --picture FOLDER`. If it is tissue, {own}."
    elif fullest > 0:
        hint = (
            f"Its pieces are small: a TISSUE_MIN_FRACTION below {fullest:.2g} would take some tiles. "
            f"For tissue that was missed, {own}."
        )
    else:
        hint = f"The slide looks empty. If there is tissue that is paler than its glass is uneven, {own}."
    return NoTissue(message, hint=hint)


def patches_bag(sizes: Sequence[tuple[int, int]], settings: Settings) -> Bag:
    """A bag that is given as images of ``sizes`` (width, height): patch i is tile i. No images: :class:`~backend.errors.TaskFieldMissing`."""
    count = len(sizes)
    if not count:
        raise TaskFieldMissing("The task's list of patches is empty.", hint="Give at least one image.")
    return Bag(
        kind="patches",
        coords=np.zeros((count, 2), np.int64),
        grid=np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1).astype(np.int64),
        grid_size=(count, 1),
        tile_size_level0=float(settings.tile_px),
        slide_size=(0, 0),
        tile_px=settings.tile_px,
        tile_mpp=0.0,
        mpp=0.0,
        mpp_source="none",
        patch_sizes=np.asarray(sizes, np.int64).reshape(count, 2),
    )


def _too_small(slide: Slide, edge: float, settings: Settings) -> SlideTooSmall:
    return SlideTooSmall(
        f"The image has {slide.size[0]} x {slide.size[1]} pixels; one tile needs {math.ceil(edge)} on each side "
        f"({settings.tile_px} at {settings.tile_mpp:g} µm per pixel).",
        hint="If the task holds a thumbnail, give the slide itself in a field `slide`; to analyse small images as they are, give a list.",
    )
