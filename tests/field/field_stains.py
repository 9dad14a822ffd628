"""One piece of tissue in many stains: the same truth, other colours.

Each picture is what light of three channels would show of stains that lie where haematoxylin and eosin lie in a real
slide, by the law of Beer and Lambert. Vectors are optical densities of red, green and blue: haematoxylin, eosin and
DAB of Ruifrok & Johnston 2001 ("Quantification of histochemical staining by color deconvolution"), the others of G.
Landini's plugin Colour Deconvolution for ImageJ and Fiji.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from field_slides import DAB, EOSIN, GIEMSA_BLUE, GIEMSA_RED, GLASS, HAEMATOXYLIN, MPP, Picture, stain_amounts, stained
from PIL import Image
from scipy import ndimage

ALCIAN_BLUE = np.array((0.875, 0.458, 0.158), np.float32)
LIGHT_GREEN = np.array((0.947, 0.254, 0.197), np.float32)  # with Feulgen
METHYL_BLUE = np.array((0.799, 0.591, 0.105), np.float32)  # Masson's trichrome
PONCEAU_FUCHSIN = np.array((0.100, 0.737, 0.668), np.float32)
METHYL_GREEN = np.array((0.980, 0.144, 0.133), np.float32)
PERIODIC_ACID_SCHIFF = np.array((0.175, 0.972, 0.155), np.float32)
FAST_RED = np.array((0.214, 0.851, 0.478), np.float32)
SILVER = np.full(3, 3**-0.5, np.float32)

OVERVIEW_MPP = 8.0
_REDUCED = 4  # stained at 2 µm/px, so that pixels of the overview mix stain and gaps as they do in a scan


@dataclass(frozen=True)
class Truth:
    """Where tissue is in the overview and where glass is, bool (h, w) each. What is neither is the blur at a border."""

    tissue: np.ndarray
    glass: np.ndarray


def overview(rgb: Picture, mpp: float) -> Picture:
    """The picture at 8 µm/px."""
    size = [round(length * mpp / OVERVIEW_MPP) for length in rgb.shape[1::-1]]
    return np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BOX))


def truth(rgb: Picture) -> Truth:
    """By the density of the slide as it was really stained: tissue is darker by 13 % or more; glass is what is 24 µm
    from all that is darker."""
    density = -np.log10(np.maximum(overview(rgb, MPP), 1) / np.float32(GLASS)).mean(axis=2)
    dark = ndimage.gaussian_filter(density, 0.7) > 0.06
    tissue = _without_small(~_without_small(~dark, 30_000), 4_000)
    return Truth(tissue, ~ndimage.binary_dilation(dark | tissue, iterations=3))


def _without_small(mask: np.ndarray, um2: float) -> np.ndarray:
    labels, count = ndimage.label(mask)
    large = np.bincount(labels.ravel(), minlength=count + 1) * OVERVIEW_MPP**2 >= um2
    large[0] = False
    return large[labels]


def stains(rgb: Picture) -> dict[str, Picture]:
    """The overview of the picture in each stain, by its name."""
    small = np.asarray(Image.fromarray(rgb).reduce(_REDUCED))
    h, e = stain_amounts(small)
    both = h + e
    positive = ndimage.gaussian_filter((ndimage.gaussian_filter(h, 6) > 0.35).astype(np.float32), 1.5)
    fibres = np.clip(3 * (both - ndimage.gaussian_filter(both, 4)), 0, 0.8)
    seen = {
        "H&E": stained((HAEMATOXYLIN, h), (EOSIN, e)),
        "H&E, half of its density": stained((HAEMATOXYLIN, h / 2), (EOSIN, e / 2)),
        "H&E, a fifth of its density": stained((HAEMATOXYLIN, h / 5), (EOSIN, e / 5)),
        "IHC: DAB, and negative stroma": stained(
            (DAB, 1.2 * both * positive),
            (HAEMATOXYLIN, 0.3 * h * positive + 0.27 * both * (1 - positive)),
        ),
        "IHC, all negative": stained((HAEMATOXYLIN, 0.15 * both)),
        "Methyl green and DAB": stained((DAB, both * positive), (METHYL_GREEN, 0.4 * both)),
        "Giemsa": stained((GIEMSA_BLUE, h), (GIEMSA_RED, 0.6 * e)),
        "Alcian blue": stained((ALCIAN_BLUE, 0.6 * both)),
        "Alcian blue, nuclear fast red": stained(
            (ALCIAN_BLUE, 0.8 * both * positive), (FAST_RED, 0.5 * both * (1 - positive))
        ),
        "PAS": stained((HAEMATOXYLIN, h / 2), (PERIODIC_ACID_SCHIFF, e)),
        "Trichrome, light green": stained(
            (HAEMATOXYLIN, h), (PONCEAU_FUCHSIN, e * positive), (LIGHT_GREEN, e * (1 - positive))
        ),
        "Trichrome, methyl blue": stained((PONCEAU_FUCHSIN, both * positive), (METHYL_BLUE, both * (1 - positive))),
        "Light green alone": stained((LIGHT_GREEN, 0.6 * both)),
        "Reticulin, silver": stained((SILVER, fibres + 0.12 * both)),
    }
    return {name: overview(picture, MPP * _REDUCED) for name, picture in seen.items()}


PENS = {
    "blue": (25, 50, 150),
    "green": (20, 120, 60),
    "red": (205, 25, 40),
    "black": (25, 24, 28),
    "purple": (90, 40, 140),
}
PEN_ROWS = 80  # of glass, above the tissue


def with_pen(seen: Picture, colour: tuple[int, int, int] | None) -> Picture:
    """An overview below 80 rows of glass with a stroke of 0.25 mm on them, soft at its edges; ``None``: with nothing
    on them."""
    rows = np.full((PEN_ROWS, seen.shape[1], 3), float(GLASS), np.float32)
    if colour is not None:
        stroke = np.zeros(rows.shape[:2], np.float32)
        stroke[20:52, 10:-10] = 0.93
        rows += ndimage.gaussian_filter(stroke, 2)[..., None] * (np.array(colour, np.float32) - rows)
    return np.concatenate([rows.astype(np.uint8), seen])


def lit(seen: Picture, glass: tuple[int, int, int] = (GLASS, GLASS, GLASS), fall: float = 0.0) -> Picture:
    """An overview with glass of another colour, and with light that falls by ``fall`` from one corner to the other;
    with a scanner's noise."""
    height, width = seen.shape[:2]
    slope = np.linspace(0, 0.5, height)[:, None] + np.linspace(0, 0.5, width)
    light = np.array(glass, np.float32) / GLASS * (1 - fall * slope[..., None])
    noise = np.random.default_rng(0).normal(0, 1.5, seen.shape)
    return (seen * light + noise).clip(0, 255).astype(np.uint8)


def found_and_false(tissue: np.ndarray, true: Truth) -> tuple[float, float]:
    """The part of true tissue that was found (not a number where there is none), and the part of glass that was taken
    for tissue."""
    found = float(tissue[true.tissue].mean()) if true.tissue.any() else np.nan
    return found, float(tissue[true.glass].mean())


def cases(rgb: Picture) -> dict[str, tuple[Picture, Truth]]:
    """Every row of docs/STAINS.md: an overview and what is right for it. Pen counts as glass."""
    true = truth(rgb)
    seen = stains(rgb)
    rows = {name: (overview_, true) for name, overview_ in seen.items()}
    pale, empty = seen["H&E, a fifth of its density"], np.full_like(seen["H&E"], GLASS)
    above = ((PEN_ROWS, 0), (0, 0))
    beside = Truth(np.pad(true.tissue, above), np.pad(true.glass, above, constant_values=True))
    for name, colour in PENS.items():
        rows[f"a fifth of its density, {name} pen beside it"] = with_pen(pale, colour), beside
    rows["a fifth of its density, yellow glass (233, 225, 207)"] = lit(pale, (233, 225, 207)), true
    rows["a fifth of its density, brown glass (215, 190, 140)"] = lit(pale, (215, 190, 140)), true
    rows["a fifth of its density, light falls by 30 %"] = lit(pale, fall=0.3), true
    nothing = Truth(np.zeros_like(true.tissue), np.ones_like(true.glass))
    rows["empty"] = lit(empty), nothing
    rows["empty, yellow glass (233, 225, 207)"] = lit(empty, (233, 225, 207)), nothing
    rows["empty, brown glass (215, 190, 140)"] = lit(empty, (215, 190, 140)), nothing
    rows["empty, light falls by 30 %"] = lit(empty, fall=0.3), nothing
    rows["empty, all colours of pen but purple"] = _all_pens(empty), nothing
    return rows


def _all_pens(empty: Picture) -> Picture:
    marked = empty.copy()
    for number, name in enumerate(("blue", "green", "red", "black")):
        top = 20 + 40 * number
        marked[top : top + 25, 10:-10] = PENS[name]
    return lit(marked)
