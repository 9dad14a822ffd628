"""``wsc-backend export-features``: stored results as the files that CLAM and TRIDENT read. Nothing is computed."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backend.commands.result_folders import RESULT, check_writable, writing_to
from backend.errors import BackendError, FileExists, ResultNotFound, SourceError
from backend.paths import StrPath
from backend.results.bag import SLIDE_ID, SLIDE_REF, BagResult
from backend.results.export import write_bytes
from backend.results.features import Layout, feature_files, layout_named, slide_name
from backend.results.hdf5 import read_hdf5
from backend.results.store import ResultStore
from backend.slides.dicom_series import is_dicom
from backend.slides.file_kinds import SLIDE_SUFFIXES
from backend.slides.names import slide_path
from backend.slides.source import SlideRef

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Source:
    """A stored result.

    Attributes
    ----------
    place
        Where it lies, for messages: a path or a bag key.
    read
        Reads it, with the latents or without.
    slide
        The slide's file name, where more is known of it than the result says.
    folder
        Name of the folder that ``predict`` made for the slide.
    """

    place: str
    read: Callable[[bool], BagResult]
    slide: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Exported:
    """What became of a result: its slide's name and files, or why it was passed over, or the error.

    ``placed``: not a bag of patches, which has no coordinates. ``written``: how many of the files were not there yet.
    """

    source: Source
    name: str = ""
    tiles: int = 0
    placed: bool = True
    files: tuple[Path, ...] = ()
    written: int = 0
    passed_over: str = ""
    error: BackendError | None = None


def export_features(
    sources: Sequence[Source],
    out: StrPath,
    layout: str,
    *,
    fingerprint: str = "",
    overwrite: bool = False,
    progress: Progress = lambda *_: None,
) -> list[Exported]:
    """Write each result's files below ``out``; what they are is told by :mod:`backend.results.features`.

    A file is named by its slide. Where different results have slides of one name, each name gets a suffix, that of the
    slide's folder of ``predict`` or else one made of what the result holds, so that it is the same the next time.
    Results that hold the same are written once. A file that is there already is left alone if it holds what would be
    written. A result that fails does not stop the others.

    Parameters
    ----------
    fingerprint
        Results of models with another fingerprint are passed over; empty: none are.

    Raises
    ------
    ExportUnsupported
        There is no such layout.
    OutputUnusable
        Nothing can be written to ``out``. (That a file is there with another content is an error of its slide alone.)
    """
    chosen, out = layout_named(layout), Path(out)
    check_writable(out)
    named, done = _named(sources, chosen, fingerprint, progress)
    for number, (name, source) in enumerate(named.items(), start=1):
        progress("write", number, len(named))
        try:
            result = source.read(True)
            files = {out / path: make for path, make in feature_files(result, name, chosen).items()}
            with writing_to(out):
                written = _write(files, overwrite)
            done.append(Exported(source, name, len(result.bag), result.bag.kind == "slide", tuple(files), written))
        except BackendError as error:
            done.append(Exported(source, name, error=error))
    return done


def _named(
    sources: Sequence[Source], layout: Layout, fingerprint: str, progress: Progress
) -> tuple[dict[str, Source], list[Exported]]:
    """The results that are to be written, by the names of their files, and what became of the others."""
    of_name: dict[str, dict[str, tuple[Source, str]]] = defaultdict(dict)
    others = []
    for number, source in enumerate(sources, start=1):
        progress("read", number, len(sources))
        try:
            result = source.read(False)
            name = slide_name(source.slide or _slide_of(result, source), layout)
        except BackendError as error:
            others.append(Exported(source, error=error))
            continue
        if fingerprint and result.provenance.get("fingerprint") != fingerprint:
            others.append(Exported(source, name, passed_over="of another model than the one in use"))
            continue
        first, _ = of_name[name].setdefault(_content(result), (source, str(result.provenance.get(SLIDE_ID, ""))))
        if first is not source:
            others.append(Exported(source, name, passed_over=f"the same as {first.place}"))
    named = {}
    for name, found in of_name.items():
        slides = Counter(slide for _, slide in found.values())
        for content, (source, slide) in found.items():
            tag = slide if slides[slide] == 1 and slide else content
            named[name if len(found) == 1 else f"{name}-{tag[:8]}"] = source
    return named, others


def _content(result: BagResult) -> str:
    """What tells two results apart: their tiles and their embedding."""
    return hashlib.sha256(result.bag.coords.tobytes() + result.slide_embedding.tobytes()).hexdigest()


def _slide_of(result: BagResult, source: Source) -> str:
    """The slide's file name, as far as the result and its place tell it; of a bag of patches, that of its place."""
    if result.bag.kind == "slide":
        said = str(result.provenance.get("slide", ""))
        with suppress(ValueError, SourceError):  # no reference in it, or not one of ours: the name has to do
            said = SlideRef.from_json(json.loads(str(result.provenance.get(SLIDE_REF, "")))).locations[0]
        name = file_name(said)
        # `predict` has named the folders of DICOM slides, whose files have numbers for names, and often no ending.
        if name and not (source.folder and Path(name).suffix.lower() not in SLIDE_SUFFIXES - {".dcm"}):
            return name
    return f"{source.folder or Path(source.place).name}.h5"


def file_name(location: str) -> str:
    """The name of the file at a path or URL; of a DICOM file, whose name is a number, that of its folder."""
    path = Path(slide_path(location))
    dicom = path.suffix.lower() == ".dcm"
    with suppress(OSError, ValueError):  # it lies elsewhere by now, or never lay here: the ending has to do
        dicom = dicom or (path.is_file() and is_dicom(path))
    return f"{path.parent.name}.dcm" if dicom and path.parent.name else path.name


def _write(files: dict[Path, Callable[[], memoryview]], overwrite: bool) -> int:
    """Write the files that are not there; how many. None is written if one of them is there with another content."""
    missing = [path for path in files if not path.exists()]
    for path in files:
        if path in missing or path.read_bytes() == files[path]():
            continue
        if not overwrite:
            raise FileExists(
                f"{path} is there already, and holds something else.",
                hint="It is of another slide of this name, or of an earlier analysis. "
                "Give another --out, or --overwrite to replace it.",
            )
        missing.append(path)
    for path in missing:
        write_bytes(path, files[path]())
    return len(missing)


# --- where results lie ----------------------------------------------------------------------------------------------


def results_in(paths: Iterable[StrPath]) -> list[Source]:
    """The results among ``paths``: files as they are given, and every ``result.h5`` in folders, which is where
    ``predict`` writes.

    Raises
    ------
    ResultNotFound
        A path does not exist, or no result is in any of them.
    """
    found: dict[Path, Source] = {}
    given = [Path(path) for path in paths]
    for path in given:
        if not path.exists():
            raise ResultNotFound(f"There is no file or folder {path}.")
        for file in _in_folder(path) if path.is_dir() else (path,):
            found[file.resolve()] = _of_file(file)
    if not found:
        raise ResultNotFound(
            f"No {RESULT} is in {', '.join(map(str, given)) or 'nothing'}.",
            hint="Give files of results, or the folder that `wsc-backend predict` wrote them to.",
        )
    return list(found.values())


def _in_folder(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        if RESULT in files:
            yield Path(parent, RESULT)


def _of_file(path: Path) -> Source:
    def read(latents: bool) -> BagResult:
        try:
            return read_hdf5(path, latents=latents)
        except FileNotFoundError:
            raise ResultNotFound(f"{path} is gone.") from None

    return Source(str(path), read, folder=path.resolve().parent.name if path.name == RESULT else "")


def results_of_store(store: ResultStore) -> list[Source]:
    """Every stored result, of whatever model and settings.

    Raises
    ------
    ResultNotFound
        Nothing is stored.
    """
    found = [of_key(store, key) for key in sorted(store.keys())]
    if not found:
        raise ResultNotFound(
            f"Nothing is stored in {store.url}.",
            hint="There lies what workers analysed for Label Studio. Give what `predict` wrote as a folder, "
            "or have slides analysed first.",
        )
    return found


def of_key(store: ResultStore, key: str, slide: str = "") -> Source:
    """The result that is stored under a bag key."""
    return Source(key, lambda latents: store.need(key, latents=latents), slide)
