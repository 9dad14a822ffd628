"""Attention as pictures: the grid of one pixel a tile, and the heatmap over the slide.

Colours follow percentile ranks, because raw attention weights of thousands of tiles differ by orders of magnitude and would
show as one bright dot on a dark slide. Nothing is smoothed: a tile has one colour, up to its edge.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from backend.errors import ExportUnsupported
from backend.results.bag import Bag, BagResult, Float32Array, Int64Array, UInt8Array
from backend.results.ranks import percentile_ranks

__all__ = [
    "SHOWN_MAX_PX",
    "attention_grid",
    "colormap_lut",
    "heatmap_image",
    "overlay",
    "percentile_ranks",
    "rank_grid",
    "shown_size",
    "tile_edges_px",
]

Colormap = Literal["viridis", "magma"]

SHOWN_MAX_PX = 2000
"""Long side of the picture that Label Studio shows: 4000 px took 9 s to be ready there, 8000 px failed."""

# Every eighth colour of matplotlib's `viridis` and `magma` (by N. J. Smith and S. van der Walt, CC0,
# https://bids.github.io/colormap/) as RGB in hexadecimal; linear between, which stays within 2/255 of the original tables.
_ANCHORS: dict[Colormap, str] = {
    "viridis": (
        "440154470d6048186a482374472d7b4537814240863e49893b528b375b8d33638d2f6b8e2c728e297a8e26828e23898e21918c"
        "1f978b1f9f8821a68527ad8131b57b3dbc744cc26c5cc8636ece5881d34d95d840aadc32c0df25d5e21aeae51afde725"
    ),
    "magma": (
        "0000040303120a0822130d341d114729115a36106b440f7651127c5d177f6a1c81762181832681902a819c2e7faa337db73779"
        "c23b75cf4070db476ae55064ee5b5ef4695cf9785dfb8761fd9668fea571feb47bfec287fed194fde0a1fceeb0fcfdbf"
    ),
}


@lru_cache(maxsize=4)
def colormap_lut(colormap: Colormap = "viridis") -> UInt8Array:
    """uint8 (256, 3): RGB of a colour map, low to high."""
    anchors = np.frombuffer(bytes.fromhex(_ANCHORS[colormap]), dtype=np.uint8).reshape(-1, 3)
    at = np.round(np.linspace(0, 255, len(anchors)))
    channels = [np.interp(np.arange(256), at, anchors[:, c]) for c in range(3)]
    lut = np.stack(channels, axis=1).round().astype(np.uint8)
    lut.setflags(write=False)  # shared by every caller
    return lut


def shown_size(slide_size: tuple[int, int], max_px: int = SHOWN_MAX_PX) -> tuple[int, int]:
    """(width, height) of the picture shown for a slide: its aspect, at most ``max_px`` long, never enlarged, at least 1 px."""
    width, height = slide_size
    if width < 1 or height < 1:
        raise ValueError(f"a slide of {width}×{height} px cannot be shown")
    scale = min(1.0, max_px / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def tile_edges_px(bag: Bag, image_size: tuple[int, int]) -> tuple[Int64Array, Int64Array]:
    """Which pixels of a picture of the whole slide belong to each column and row of tiles.

    A pixel belongs to the tile that holds its centre. Neighbours share their edge, so that a map has neither gaps nor
    overlaps whatever the scale; where tiles are smaller than a pixel, some get none.

    Parameters
    ----------
    bag
        Of kind ``"slide"``.
    image_size
        (width, height) of the picture in pixels.

    Returns
    -------
    int64 (columns + 1,) and int64 (rows + 1,): pixels ``edges[c]`` up to, not including, ``edges[c + 1]``.
    """

    def edges(tiles: int, slide_px: int, image_px: int) -> Int64Array:
        lines = np.arange(tiles + 1) * bag.tile_size_level0 * (image_px / slide_px)
        inside: Int64Array = np.clip(np.ceil(lines - 0.5), 0, image_px).astype(np.int64)
        return inside

    columns, rows = bag.grid_size
    return (
        edges(columns, bag.slide_size[0], image_size[0]),
        edges(rows, bag.slide_size[1], image_size[1]),
    )


def _attention(result: BagResult, head: int | None) -> Float32Array:
    if head is None:
        return result.mean_attention
    heads = result.attention_logits.shape[1]
    if not 0 <= head < heads:
        raise ValueError(f"head {head} does not exist: the model has heads 0 to {heads - 1}")
    return result.attention[:, head]


def _on_grid(bag: Bag, values: npt.NDArray[np.floating]) -> Float32Array:
    columns, rows = bag.grid_size
    grid = np.full((rows, columns), np.nan, dtype=np.float32)
    grid[bag.grid[:, 1], bag.grid[:, 0]] = values
    return grid


def attention_grid(result: BagResult, head: int | None = None) -> Float32Array:
    """float32 (rows, columns): attention weight of each tile, NaN where there is none. ``head`` None: mean over the heads."""
    return _on_grid(result.bag, _attention(result, head))


def rank_grid(result: BagResult, head: int | None = None) -> Float32Array:
    """float32 (rows, columns): percentile rank of each tile in [0, 1], NaN where there is none."""
    return _on_grid(result.bag, percentile_ranks(_attention(result, head)))


def heatmap_image(result: BagResult, head: int | None = None, colormap: Colormap = "viridis") -> Image.Image:
    """The heatmap as an RGBA image of one pixel a tile, transparent where there is no tile."""
    ranks = rank_grid(result, head)
    tiles = np.isfinite(ranks)
    pixels = np.zeros((*ranks.shape, 4), dtype=np.uint8)
    pixels[tiles, :3] = colormap_lut(colormap)[np.round(ranks[tiles] * 255).astype(np.intp)]
    pixels[tiles, 3] = 255
    return Image.fromarray(pixels, mode=None)


def overlay(
    overview: Image.Image,
    result: BagResult,
    *,
    head: int | None = None,
    alpha: float = 0.5,
    colormap: Colormap = "viridis",
) -> Image.Image:
    """The heatmap over a picture of the whole slide, with a legend below it.

    Parameters
    ----------
    overview
        The whole slide at any scale, RGB.
    result
        Of a bag of kind ``"slide"``.
    head
        Which head's attention; ``None`` for the mean.
    alpha
        Opacity of the heatmap, 0 to 1. Glass without tiles is left as it is.

    Returns
    -------
    RGB image, as wide as the overview (and at least as wide as the legend needs).

    Raises
    ------
    ExportUnsupported
        The bag is a bag of patches: they have no place on a slide.
    """
    if result.bag.kind != "slide":
        raise ExportUnsupported(
            "A bag of patches has no slide to lay a heatmap over.", hint="Use the attention of each patch instead."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, not {alpha}")
    base = np.asarray(overview.convert("RGB"))
    height, width = base.shape[:2]
    heat = np.asarray(heatmap_image(result, head, colormap))
    column_edges, row_edges = tile_edges_px(result.bag, (width, height))
    columns, rows = np.diff(column_edges), np.diff(row_edges)
    heat = np.repeat(np.repeat(heat, rows, axis=0), columns, axis=1)
    painted = base.copy()
    part = painted[: heat.shape[0], : heat.shape[1]]
    tiles = heat[..., 3] > 0
    part[tiles] = np.round((1 - alpha) * part[tiles] + alpha * heat[tiles, :3]).astype(np.uint8)
    return _with_legend(Image.fromarray(painted), result, head, colormap)


# --- legend -----------------------------------------------------------------------------------------------------


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _fitted(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """``text``, cut with three dots where it is wider than ``width`` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def _with_legend(picture: Image.Image, result: BagResult, head: int | None, colormap: Colormap) -> Image.Image:
    """``picture`` with a white strip below: colour bar from low to high, what it shows, which model."""
    size = min(28, max(12, picture.width // 70))
    font = _font(size)
    pad = size // 2
    width = max(picture.width, 24 * size)
    bar_width, bar_height = 10 * size, size
    canvas = Image.new("RGB", (width, picture.height + 4 * pad + 2 * size + pad), "white")
    canvas.paste(picture, (0, 0))
    draw = ImageDraw.Draw(canvas)
    ink, top = (40, 40, 40), picture.height + pad
    left = pad
    draw.text((left, top), "low", fill=ink, font=font)
    left += round(font.getlength("low")) + pad
    bar = colormap_lut(colormap)[np.linspace(0, 255, bar_width).round().astype(np.intp)]
    canvas.paste(Image.fromarray(np.repeat(bar[None], bar_height, axis=0)), (left, top + size // 6))
    left += bar_width + pad
    draw.text((left, top), "high", fill=ink, font=font)
    left += round(font.getlength("high")) + 2 * pad
    which = "mean of the heads" if head is None else f"head {head}"
    what = f"attention, percentile rank ({which})"
    draw.text((left, top), _fitted(what, font, width - left - pad), fill=ink, font=font)
    model = str(result.provenance.get("model_version", "unknown model"))
    if result.provenance.get("stand_in"):
        model += " (a stand-in model: no medical meaning)"
    second = top + size + 2 * pad
    draw.text((pad, second), _fitted(f"{model} · research use only", font, width - 2 * pad), fill=ink, font=font)
    return canvas
