"""The whole way of one slide, from where it lies to its stored result: fetch → open → tissue → tiles → encode → pool → store."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import ModelMismatch
from backend.inference.key import bag_key
from backend.paths import StrPath
from backend.results.bag import BAG_KEY, SLIDE_REF, Bag, BagResult
from backend.results.store import ResultStore
from backend.settings import Settings
from backend.slides.names import slide_name
from backend.slides.reader import open_slide
from backend.slides.source import SlideRef, SourceResolver
from backend.slides.tiles import patch_sizes, read_patches, read_tiles
from backend.slides.tiling import make_bag, patches_bag

if TYPE_CHECKING:  # who only looks at what is there already loads no torch
    from backend.inference.engine import Engine

# (stage, done, total): stages are "fetch", "open", "tissue", "encode", "store"; done and total count tiles and are 0 before "encode".
StageProgress = Callable[[str, int, int], None]


def analyse_ref(
    ref: SlideRef,
    *,
    key: str,
    settings: Settings,
    engine: Engine,
    store: ResultStore,
    progress: StageProgress,
    resolver: SourceResolver | None = None,
) -> BagResult:
    """Analyse the slide that ``ref`` points to and store the result under ``key``.

    Errors are those of :mod:`backend.slides` and :class:`~backend.inference.engine.Engine`; nothing is stored then.
    """
    if key != (own := bag_key(ref, engine.identity, settings)):
        raise ModelMismatch(
            f"Bag {key[:12]} was asked for by a backend with another model or other settings: this worker, with "
            f"{engine.identity.model_version} and {settings.tile_px} px at {settings.tile_mpp} µm/px, would make {own[:12]}.",
            hint="Give backend and workers the same MODEL, PRECISION, DEFAULT_MPP, TILE_… and TISSUE_… and restart both.",
        )
    progress("fetch", 0, 0)
    paths, tissue_file = (resolver or SourceResolver(settings)).fetch_with_tissue(ref)
    if ref.kind == "patches":
        result = analyse_patches(paths, settings, engine, progress)
    else:
        result = analyse_file(
            paths[0],
            settings,
            engine,
            progress,
            task_mpp=ref.mpp,
            mpp_override=ref.mpp_override,
            tissue_file=tissue_file,
        )
        # A downloaded file has the cache's name.
        result = replace(result, provenance={**result.provenance, "slide": slide_name(ref.locations[0])})
    result = replace(result, provenance={**result.provenance, BAG_KEY: key})
    if not any(
        "?" in location for location in (*ref.locations, ref.tissue or "")
    ):  # an address may carry a password in its query
        result = replace(result, provenance={**result.provenance, SLIDE_REF: json.dumps(ref.to_json())})
    progress("store", len(result.bag), len(result.bag))
    store.put(key, result)
    return result


def analyse_file(
    path: StrPath,
    settings: Settings,
    engine: Engine,
    progress: StageProgress,
    *,
    task_mpp: float | None = None,
    mpp_override: bool = False,
    tissue_file: StrPath | None = None,
) -> BagResult:
    """Analyse one slide file.

    Parameters
    ----------
    task_mpp
        µm per pixel for a file that does not say; with ``mpp_override`` also for one that does.
    tissue_file
        A mask of tissue that is used in place of what would be found.
    """
    path = Path(path)
    started = time.time()
    progress("open", 0, 0)
    with open_slide(path, settings) as slide:
        progress("tissue", 0, 0)
        bag = make_bag(slide, settings, task_mpp=task_mpp, mpp_override=mpp_override, tissue_file=tissue_file)
        progress("encode", 0, len(bag))
        tiles = read_tiles(slide, bag, chunk=engine.batch_tiles, threads=settings.read_threads)
        try:
            result = engine.analyse(
                bag,
                tiles,
                progress=lambda done, total: progress("encode", done, total),
                provenance={
                    **_when(started),
                    "slide": path.name,
                    "icc_applied": False,
                    "tissue_mpp": settings.tissue_mpp,
                    "tissue_min_fraction": settings.tissue_min_fraction,
                    "tissue_pen_rules": settings.tissue_pen_rules,
                    **_tissue(bag),
                },
            )
            # Who reads the pixels may change while they are read.
            notes = tuple(dict.fromkeys((*bag.notes, *slide.notes)))
            provenance = {**result.provenance, "reader": slide.reader, **({"notes": "\n".join(notes)} if notes else {})}
            return replace(result, bag=replace(bag, notes=notes), provenance=provenance)
        finally:
            tiles.close()


def analyse_patches(paths: Sequence[StrPath], settings: Settings, engine: Engine, progress: StageProgress) -> BagResult:
    """Analyse a bag that is given as images: each becomes one tile, scaled to the encoder's size."""
    started = time.time()
    progress("open", 0, 0)
    bag = patches_bag(patch_sizes(paths, settings), settings)
    progress("encode", 0, len(bag))
    tiles = read_patches(paths, bag, settings, chunk=engine.batch_tiles, threads=settings.read_threads)
    try:
        return engine.analyse(
            bag,
            tiles,
            progress=lambda done, total: progress("encode", done, total),
            provenance={
                **_when(started),
                "slide": f"{len(paths)} patches",
                "reader": "image patches",
                "icc_applied": False,
            },
        )
    finally:
        tiles.close()


def _tissue(bag: Bag) -> dict[str, str | float]:
    if bag.tissue is None:
        return {}
    return {
        "tissue_source": bag.tissue.source,
        "tissue_share": bag.tissue.share,
        "tissue_ink_share": bag.tissue.ink_share,
    }


def _when(started: float) -> dict[str, str]:
    return {"analysed_at": datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds")}
