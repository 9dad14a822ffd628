"""Run as a program: reads mutants as a worker and the panel do, many in one process, and says of each what came of it.

    python mutant_reader.py FOLDER START STOP STEP

One line of JSON before each mutant and one after, so that whoever reads them knows which one the process died of.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

from hostile.mutation import Mutator, bombs

from backend.errors import BackendError
from backend.settings import Settings, load_settings
from backend.slides.reader import open_slide, read_patch
from backend.slides.thumbnails import ThumbnailStore
from backend.slides.tiles import read_tiles
from backend.slides.tiling import make_bag

CPU_S = 10  # a mutant that takes more has hung; processor time, so that a busy machine does not matter
MEMORY_BYTES = 4 * 2**30
TILES = 6


def use(path: Path, settings: Settings) -> str:
    """What a worker does with a slide, short of the model, and what the panel and the import do. Returns the reader's name."""
    with open_slide(path, settings) as slide:
        ThumbnailStore(settings.model_dir).make(path.name, slide)
        bag = make_bag(slide, settings, task_mpp=0.5)
        few = replace(bag, coords=bag.coords[:TILES], grid=bag.grid[:TILES])
        with closing(read_tiles(slide, few, chunk=4, threads=2)) as tiles:
            for chunk in islice(tiles, TILES):
                assert chunk.shape[1:] == (settings.tile_px, settings.tile_px, 3)
        slide.read_region(-10, -10, 4 * settings.tile_px, settings.tile_px)
        return slide.reader


def judge(path: Path, settings: Settings) -> tuple[str, str]:
    """``("good", reader)``, ``("typed", code)`` or ``("untyped", traceback)``."""
    try:
        if path.suffix in (".jpg", ".png"):
            read_patch(path, settings.tile_px, settings)
        return "good", use(path, settings)
    except BackendError as error:
        return "typed", error.code
    except Exception:  # noqa: BLE001  # this is what is looked for
        return "untyped", traceback.format_exc()[-3000:]


def main() -> None:
    folder, start, stop, step = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Reading a mutant ends by SIGPROF after CPU_S of processor time.
    os.nice(5)
    mine = folder / f"reader-{start % step}"
    mine.mkdir(exist_ok=True)
    settings = load_settings(
        model_dir=mine / "model-dir", tile_px=64, tissue_min_fraction=0.05, image_max_pixels=20_000_000
    )
    mutator = Mutator(sorted((folder / "seeds").iterdir()))
    named = bombs()
    for number in range(start, stop, step):
        if number < len(named):
            name, data = list(named.items())[number]
            seed, damage = name, "bomb"
        else:
            mutant = mutator.mutant(number)
            seed, damage, data = mutant.seed, mutant.damage, mutant.data
        path = mine / f"{number}{Path(seed).suffix}"
        path.write_bytes(data)
        print(json.dumps({"begin": number, "seed": seed, "damage": damage}), flush=True)
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, CPU_S)
        outcome, detail = judge(path, settings)
        signal.setitimer(signal.ITIMER_PROF, 0)
        taken = round(time.process_time() - began, 3)
        print(json.dumps({"end": number, "outcome": outcome, "detail": detail, "cpu_s": taken}), flush=True)
        if outcome != "untyped":
            path.unlink()
        for left in (mine / "model-dir" / "thumbnails").glob("*.jp*g"):
            left.unlink()


if __name__ == "__main__":
    main()
