"""``wsc-backend predict``: slides on disk → heatmap, regions, HDF5, GeoJSON. Neither Label Studio nor Redis.

What is analysed already, in the folder of a former call or in the store of results, is not analysed again. In a slide's
folder ``result.h5`` is written first; all other files are made of it and of the slide, so that a call that was killed
is completed without the model.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from PIL import Image

from backend.commands.one_slide import failures_named
from backend.commands.result_folders import RESULT, ResultFolders, check_writable, slide_id, writing_to, written_there
from backend.errors import BackendError, StoreUnavailable
from backend.inference.checkpoint import ModelIdentity, model_identity
from backend.inference.key import bag_key
from backend.inference.pipeline import StageProgress, analyse_file
from backend.label_studio.check import check_prediction
from backend.label_studio.labeling_config import load_template, parse_config
from backend.label_studio.regions import predict_regions
from backend.paths import StrPath
from backend.results.bag import BAG_KEY, SLIDE_ID, SLIDE_REF, Bag, BagResult
from backend.results.export import whole_file, write_json
from backend.results.hdf5 import read_hdf5
from backend.results.store import ResultStore
from backend.settings import Settings
from backend.slides.geojson import to_geojson
from backend.slides.mpp import given_scale_note
from backend.slides.reader import open_slide
from backend.slides.render import SHOWN_MAX_PX, overlay, shown_size
from backend.slides.source import SlideRef, file_identity
from backend.slides.tiling import locate_tissue, slide_grid
from backend.slides.tissue_file import tissue_file_beside
from backend.slides.tissue_picture import draw_tissue

if TYPE_CHECKING:  # a call that finds all results there loads no torch
    from backend.inference.engine import Engine

log = logging.getLogger(__name__)

PICTURE, TISSUE, REGIONS, TILES = "heatmap.png", "tissue.png", "regions.json", "tiles.geojson"

_REPLACED = (
    "An earlier result was replaced: it was made with another scale, mask, model or setting, or of a file that has "
    "changed since. To keep both, give another --out."
)

Origin = Literal["analysed", "folder", "store"]


@dataclass(frozen=True)
class Outcome:
    """What became of one slide: the folder of its files and its bag, or the error.

    Attributes
    ----------
    origin
        Where the result is from: analysed now, of a former call into this folder, or of the store of results.
    notes
        What of the slide, or of a scale that was given, is not used: a sentence each.
    """

    slide: Path
    folder: Path | None = None
    bag: Bag | None = None
    origin: Origin = "analysed"
    error: BackendError | None = None
    notes: tuple[str, ...] = ()


def predict_files(
    slides: Iterable[StrPath],
    out: StrPath,
    settings: Settings,
    engine: Engine | Callable[[], Engine],
    *,
    mpp: float | None = None,
    force: bool = False,
    again: bool = False,
    level0: bool = False,
    on_look: Callable[[int, Path], None] = lambda *_: None,
    on_slide: Callable[[int, Path], None] = lambda *_: None,
    on_error: Callable[[Outcome], None] = lambda _: None,
    progress: StageProgress = lambda *_: None,
) -> list[Outcome]:
    """Analyse each slide and write its files into ``out/<name of the slide>/``, with a suffix where another slide has
    that name.

    Written are ``heatmap.png`` (attention over the slide), ``tissue.png`` (what was taken for tissue, and what for
    ink), ``regions.json`` (a Label Studio prediction for the default labelling config), ``tiles.geojson`` (for QuPath)
    and ``result.h5``. A mask of tissue that lies beside a slide is used. All slides are opened first, so that what is
    wrong with one is said before the long work. A slide that fails does not stop the others.

    Parameters
    ----------
    engine
        The loaded model, or what loads it: called once, when the first slide has to be analysed.
    mpp
        µm per pixel of slides that do not say.
    force
        Take ``mpp`` also for slides that state another.
    again
        Whether to analyse also what is analysed already.
    level0
        Whether ``tiles.geojson`` has the coordinates of level 0 instead of QuPath's.
    on_look, on_slide
        Called with number and path of each slide before it is opened for a first look, and before it is analysed.
    on_error
        Called as soon as a slide has failed.

    Raises
    ------
    OutputUnusable
        Nothing can be written to ``out``.
    ModelError
        There is no such model. Errors of the model while slides are analysed are those of the slides.
    """
    call = _Call([Path(slide) for slide in slides], Path(out), settings, engine, mpp, force, again, level0)
    outcomes: dict[int, Outcome] = {}
    keys: dict[int, str] = {}

    def failed(number: int, error: BackendError) -> None:
        outcomes[number] = Outcome(call.slides[number], error=error)
        on_error(outcomes[number])

    for number, slide in enumerate(call.slides):
        on_look(number, slide)
        try:
            with failures_named(slide):
                keys[number] = call.look(slide)
        except BackendError as error:
            failed(number, error)
    for number, key in keys.items():
        slide = call.slides[number]
        on_slide(number, slide)
        try:
            with failures_named(slide):
                outcomes[number] = call.predict(slide, key, progress)
        except BackendError as error:
            failed(number, error)
    return [outcomes[number] for number in range(len(call.slides))]


class _Call:
    """One call of :func:`predict_files`."""

    def __init__(
        self,
        slides: list[Path],
        out: Path,
        settings: Settings,
        engine: Engine | Callable[[], Engine],
        mpp: float | None,
        force: bool,
        again: bool,
        level0: bool,
    ) -> None:
        self.slides = slides
        self._out = out
        self._settings = settings
        self._mpp = mpp
        self._force = force
        self._masks: dict[Path, Path | None] = {}
        self._unused: dict[Path, str] = {}  # slides that state their own scale, and what is to be said of the given one
        self._again = again
        self._level0 = level0
        check_writable(out)
        self._store = ResultStore(settings.results_location)
        self._engine = engine
        self._model: ModelIdentity = model_identity(settings) if callable(engine) else engine.identity
        self._folders = ResultFolders(out, slides)

    def look(self, slide: Path) -> str:
        """The bag key of a slide; raises what can be found wrong with it before its tissue is looked for."""
        real = os.path.realpath(slide)
        ref = SlideRef("file", (real,), file_identity(real), mpp=self._mpp, mpp_override=self._force)
        self._masks[slide] = mask = tissue_file_beside(real)
        if mask is not None:
            location = os.path.realpath(mask)
            ref = replace(ref, tissue=location, tissue_identity=file_identity(location))
        # Without a scale from outside the key is known without opening the slide.
        if self._mpp is None and self._is_there(slide, key := bag_key(ref, self._model, self._settings)):
            return key
        with open_slide(slide, self._settings) as opened:
            _, scale_used, source = slide_grid(opened, self._settings, task_mpp=self._mpp, mpp_override=self._force)
            if mask is not None:
                locate_tissue(opened, self._settings, scale_used, mask)  # a mask that is no use is said now
            scale = opened.scale
        if source == "slide":  # the key of a task is of the same kind: a scale that is not used is not in it
            ref = replace(ref, mpp=None)
            if self._mpp is not None:
                self._unused[slide] = given_scale_note(scale, self._mpp, forced=False)
        return bag_key(ref, self._model, self._settings)

    def predict(self, slide: Path, key: str, progress: StageProgress) -> Outcome:
        """The files of a slide, whatever of them is there."""
        folder = self._folders.choose(slide)
        if self._is_there(slide, key):
            result = read_hdf5(folder / RESULT, latents=False)
            progress("write", len(result.bag), len(result.bag))
            # What a killed call has not written, and what depends on the options of this one. The pictures, which take
            # longest, do not.
            names = (PICTURE,) if result.bag.tissue is None else (PICTURE, TISSUE)
            pictures = not all((folder / name).is_file() for name in names)
            write_derived(slide, result, folder, self._settings, pictures=pictures, level0=self._level0)
            return Outcome(slide, folder, result.bag, "folder", notes=self._notes(slide, result.bag))
        check_writable(self._out)  # before minutes of analysis, once for each slide
        stored = None if self._again else self._stored(key)
        mpp = None if slide in self._unused else self._mpp
        mask = self._masks[slide]  # the one that the key covers, whatever has come to lie there since
        result = stored or analyse_file(
            slide,
            self._settings,
            self._loaded(),
            progress,
            task_mpp=mpp,
            mpp_override=self._force,
            tissue_file=mask,
        )
        progress("write", len(result.bag), len(result.bag))
        there = written_there(folder)
        folder = self._write(slide, key, result, folder)
        origin: Origin = "store" if stored else "analysed"
        notes = self._notes(slide, result.bag)
        if there[0] == slide_id(slide) and there[1] != key:
            notes += (_REPLACED,)
        return Outcome(slide, folder, result.bag, origin, notes=notes)

    def _notes(self, slide: Path, bag: Bag) -> tuple[str, ...]:
        unused = self._unused.get(slide)
        return (unused, *bag.notes) if unused else bag.notes

    def _is_there(self, slide: Path, key: str) -> bool:
        return not self._again and written_there(self._folders.choose(slide)) == (slide_id(slide), key)

    def _stored(self, key: str) -> BagResult | None:
        try:
            return self._store.get(key)
        except StoreUnavailable as error:
            log.warning("analysed again, as the store of results cannot be asked: %s", error)
            return None

    def _loaded(self) -> Engine:
        if callable(self._engine):
            self._engine = self._engine()
        return self._engine

    def _write(self, slide: Path, key: str, result: BagResult, folder: Path) -> Path:
        provenance = {**result.provenance, BAG_KEY: key, SLIDE_ID: slide_id(slide)}
        provenance.pop(SLIDE_REF, None)  # where the slide lies is not for those who are given the file
        result = replace(result, provenance=dict(sorted(provenance.items())))  # as it is read back
        if written_there(folder)[0] == slide_id(slide):
            with writing_to(folder):
                for name in (PICTURE, TISSUE, REGIONS, TILES):  # of the result that is replaced
                    (folder / name).unlink(missing_ok=True)
        folder = self._folders.write(result, slide, folder)
        write_derived(slide, result, folder, self._settings, level0=self._level0)
        return folder


def write_derived(
    slide: StrPath,
    result: BagResult,
    folder: StrPath,
    settings: Settings,
    *,
    pictures: bool = True,
    level0: bool = False,
) -> None:
    """The files of one result beside ``result.h5``, each whole or not there; see :func:`predict_files`. Without latents
    too.

    Raises
    ------
    OutputUnusable
        The system refuses to write them.
    """
    slide, folder = Path(slide), Path(folder)
    if pictures:
        with open_slide(slide, settings) as opened:
            overview = Image.fromarray(opened.overview(SHOWN_MAX_PX))
        if result.bag.tissue is not None:  # earlier results do not say it
            with writing_to(folder), whole_file(folder / TISSUE) as temporary:
                draw_tissue(overview, result.bag.tissue).save(temporary, "PNG")
        with writing_to(folder), whole_file(folder / PICTURE) as temporary:
            overlay(overview, result).save(temporary, "PNG")
    config_xml = load_template("triage")
    size = shown_size(result.bag.slide_size)
    prediction = predict_regions(
        result,
        parse_config(config_xml),
        image_size=size,
        model_version=str(result.provenance["model_version"]),
        settings_top_k=settings.top_k,
    )
    check_prediction(prediction, config_xml, image_size=size)
    with writing_to(folder):
        write_json(folder / REGIONS, json.loads(json.dumps(prediction)))
        write_json(folder / TILES, to_geojson(result, slide.name, level0=level0))
