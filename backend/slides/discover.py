"""Finding slides in folders: one path for each slide, however many files it consists of and names it has, and what was
passed over and why.

Files are known by their first bytes, so that a slide needs no ending; a known ending suffices too, so that a damaged
slide is named when it is opened.
"""

from __future__ import annotations

import os
import stat
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from backend.errors import SlideNotFound
from backend.paths import StrPath
from backend.slides.companions import is_hamamatsu_index, named_files
from backend.slides.dicom_header import DicomHeader
from backend.slides.dicom_series import header_of, opening_file, series_in
from backend.slides.file_kinds import SLIDE_SUFFIXES, Kind, accompanying, kind_of
from backend.slides.tissue_file import ENDINGS as MASK_ENDINGS

_RESULTS, _RESULT_PICTURES = frozenset(("result.h5", "regions.json")), frozenset(("heatmap.png", "tissue.png"))
_MIRAX_INDEX, _MIRAX_PARTS = "Slidedat.ini", (".dat", ".ini")
_INDEX_SUFFIXES = (".vms", ".vmu")
_DETAILS_SHOWN = 4


class Why(Enum):
    """Why something is no slide: for one, for several."""

    NO_FORMAT = ("file of no slide format", "files of no slide format")
    OTHER_DICOM = ("DICOM file that shows no slide", "DICOM files that show no slide")
    NO_PYRAMID = ("DICOM series without the slide itself", "DICOM series without the slide itself")
    DAMAGED_DICOM = ("DICOM file with a damaged header", "DICOM files with damaged headers")
    BESIDE = ("picture that accompanies a slide", "pictures that accompany slides")
    MASK = ("mask of tissue", "masks of tissue")
    RESULT = ("picture that `predict` wrote", "pictures that `predict` wrote")
    SAME = ("second name of a slide", "second names of slides")
    COPY = ("copy of a DICOM slide", "copies of DICOM slides")
    LOOP = ("link to a folder that is searched anyway", "links to folders that are searched anyway")
    BROKEN = ("broken link", "broken links")
    LONE_DATA = ("data folder without its .mrxs", "data folders without their .mrxs")
    UNREADABLE = ("path that may not be read", "paths that may not be read")


@dataclass(frozen=True)
class PassedOver:
    """A file or folder that is not taken for a slide, why, and a word on it such as its ending."""

    path: Path
    why: Why
    detail: str


@dataclass(frozen=True)
class Found:
    """The slides that a search found, in order, and what it passed over. The files that belong to a slide of several
    files are neither.
    """

    slides: list[Path] = field(default_factory=list)
    passed_over: list[PassedOver] = field(default_factory=list)

    @property
    def summary(self) -> str:
        """What was passed over, in one line: ``"Passed over: 12 files of no slide format (.xml 10, .txt 2), 1 broken
        link (a.svs)."``; or ``""``.
        """
        groups = [self._group(why) for why in Why]
        said = ", ".join(group for group in groups if group)
        return f"Passed over: {said}." if said else ""

    def _group(self, why: Why) -> str:
        details = Counter(passed.detail for passed in self.passed_over if passed.why is why)
        if not details:
            return ""
        shown = [f"{d} {n}" if n > 1 or why is Why.NO_FORMAT else d for d, n in details.most_common(_DETAILS_SHOWN)]
        more = ", …" if len(details) > _DETAILS_SHOWN else ""
        return f"{details.total()} {why.value[details.total() > 1]} ({', '.join(shown)}{more})"


def find_slides(paths: StrPath | Iterable[StrPath]) -> Found:
    """The slides among ``paths``: files, and folders that are searched with their subfolders. A single path may be
    given as such.

    One slide is one path: by real file (links and hard links are other names of it; the first that is no link is
    taken), and for DICOM by series and kind of object. Files of a ``.mrxs`` or ``.vms`` belong to it. Pictures that
    accompany slides, and what is of no slide format, are passed over, as are hidden files. If that leaves nothing,
    files that were named themselves are taken as they are.

    Raises
    ------
    SlideNotFound
        No path exists, or there is no slide in any of them. One of several that does not exist is taken for a slide:
        opening it says so.
    """
    given = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
    if given and not any(os.path.lexists(path) for path in given):
        raise SlideNotFound(f"There is no file or folder {', '.join(map(str, given))}.")
    search = _Search()
    for order, path in enumerate(given):
        search.add(path, order)
    found = search.result()
    named = [path for path in given if not _is_folder(path)]
    if not found.slides and named:
        return Found(named)
    if not found.slides:
        raise SlideNotFound(
            f"No slide was found in {', '.join(map(str, given)) or 'nothing'}. {found.summary}".strip(),
            hint=f"Slides are known by their content, or by their endings: {', '.join(sorted(SLIDE_SUFFIXES))}.",
        )
    return found


_FileId = tuple[int, int] | str


class _Search:
    """One search: :meth:`add` what is given, in order, then take the :meth:`result`."""

    def __init__(self) -> None:
        self._roots: list[Path] = []
        self._folders: set[_FileId] = set()  # searched
        self._files: list[
            tuple[int, Path]
        ] = []  # with the number of what was given; names that are no links come first
        self._links: deque[tuple[int, Path]] = deque()
        self._absent: dict[Path, int] = {}
        self._passed: list[PassedOver] = []

    def add(self, path: Path, order: int) -> None:
        if _is_folder(path):
            self._roots.append(Path(os.path.realpath(path)))
            if (slide := _slide_of_data(path)) is not None:
                self._files.append((order, slide))
            self._walk(path, order)
        elif _status(path) is None:
            self._absent[path] = order
        elif path.is_symlink():
            self._links.append((order, path))
        else:
            self._files.append((order, path))

    def result(self) -> Found:
        self._follow_links()
        kinds: dict[Path, Kind] = {}
        orders = dict(self._absent)
        first_names: dict[_FileId, Path] = {}
        second_names: list[tuple[Path, Path]] = []
        for order, path in self._files:
            first = first_names.setdefault(_id_of(path), path)
            if first is not path:
                second_names.append((path, first))
            else:
                kinds[path], orders[path] = kind_of(path), order
        parts = {part for path in kinds if path.suffix.lower() in _INDEX_SUFFIXES for part in _parts(path)}
        slides = {path: kind for path, kind in kinds.items() if path not in parts and self._may_be_slide(path, kind)}
        dicom = self._dicom_slides([path for path, kind in kinds.items() if kind is Kind.DICOM])
        orders |= {opening: orders[path] for opening, path in dicom.items()}
        for path in list(accompanying(slides, dicom)):
            del slides[path]
            self._pass(path, Why.MASK if path.name.lower().endswith(MASK_ENDINGS) else Why.BESIDE, path.name)
        for path, first in second_names:
            if path != first and (first in slides or first in dicom):
                self._pass(path, Why.SAME, f"{path.name} of {first.name}")
        found = sorted((*slides, *dicom, *self._absent), key=lambda path: (orders[path], path))
        return Found(found, sorted(self._passed, key=lambda passed: passed.path))

    def _may_be_slide(self, path: Path, kind: Kind) -> bool:
        if kind is Kind.NONE and path.name.lower().endswith(MASK_ENDINGS):
            self._pass(path, Why.MASK, path.name)
        elif kind is Kind.NONE:
            self._pass(path, Why.NO_FORMAT, path.suffix.lower() or "no ending")
        elif kind is Kind.UNREADABLE:
            self._pass(path, Why.UNREADABLE, path.name)
        elif path.name in _RESULT_PICTURES and any((path.parent / name).is_file() for name in _RESULTS):
            self._pass(path, Why.RESULT, path.name)
        else:
            return kind is not Kind.DICOM
        return False

    def _dicom_slides(self, files: list[Path]) -> dict[Path, Path]:
        """By which file each slide is opened of which ``files`` are levels, and the first of these. More levels may lie
        beside those.
        """
        found: dict[Path, Path] = {}
        instances: dict[str, Path] = {}
        series: dict[Path, dict[str, dict[Path, DicomHeader]]] = {}
        seen: set[tuple[Path, str]] = set()
        for path in files:
            header = header_of(path)
            if header is None:
                self._pass(path, Why.DAMAGED_DICOM, path.name)
            elif not header.is_whole_slide:
                self._pass(path, Why.OTHER_DICOM, header.sop_class_name)
            elif (of := (path.parent, header.series_uid or path.name)) not in seen:
                seen.add(of)
                if path.parent not in series:
                    series[path.parent] = series_in(path.parent)
                levels = series[path.parent].get(of[1], {path: header})
                opening = opening_file(levels)
                if opening is None:
                    kinds = sorted({kind.lower() for level in levels.values() for kind in level.image_type[2:3]})
                    self._pass(path, Why.NO_PYRAMID, " and ".join(kinds) or path.name)
                    continue
                # Of one instance there is one image: the same in another folder is a copy (PS3.5, 9).
                first = instances.setdefault(levels[opening].instance_uid or str(opening), opening)
                if first == opening:
                    found[opening] = path
                else:
                    self._pass(opening, Why.COPY, f"{opening} of {first}")
        return found

    def _pass(self, path: Path, why: Why, detail: str) -> None:
        self._passed.append(PassedOver(path, why, detail))

    def _walk(self, top: Path, order: int) -> None:
        pending = [top]
        while pending:
            folder = pending.pop()
            try:
                folder_id = _id_of(folder)
                entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
            except OSError as error:
                self._pass(folder, Why.UNREADABLE, f"{folder.name}: {error.strerror}")
                continue
            if folder_id in self._folders:
                continue
            self._folders.add(folder_id)
            of_mirax = any(entry.name == _MIRAX_INDEX for entry in entries)
            if of_mirax and _slide_of_data(folder) is None:
                self._pass(folder, Why.LONE_DATA, folder.name)
            inner: list[Path] = []
            for entry in entries:
                path = folder / entry.name
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    self._links.append((order, path))
                elif entry.is_dir():
                    inner.append(path)
                elif entry.is_file() and not (of_mirax and path.suffix.lower() in (".dat", ".ini")):
                    self._files.append((order, path))
            pending.extend(reversed(inner))  # the first is searched next

    def _follow_links(self) -> None:
        while self._links:
            order, path = self._links.popleft()
            if _status(path) is None:
                self._pass(path, Why.BROKEN, path.name)
            elif not _is_folder(path):
                self._files.append((order, path))
            elif _id_of(path) in self._folders or self._leads_up(path):
                self._pass(path, Why.LOOP, path.name)
            else:
                self._walk(path, order)

    def _leads_up(self, link: Path) -> bool:
        # What lies above the folders that were given was not asked for.
        real = Path(os.path.realpath(link))
        return any(root.is_relative_to(real) for root in self._roots)


def _status(path: Path) -> os.stat_result | None:
    """``None`` where there is nothing, or nothing that may be looked at."""
    try:
        return path.stat()
    except OSError:
        return None


def _is_folder(path: Path) -> bool:
    status = _status(path)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _id_of(path: Path) -> _FileId:
    """What all names of one file or folder share; the path itself where there is none (any more)."""
    status = _status(path)
    if status is None:
        return str(path)
    return (
        (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)
    )  # some network shares number nothing


def _slide_of_data(folder: Path) -> Path | None:
    """The ``.mrxs`` whose data this folder holds, beside it."""
    folder = folder.absolute()
    if not (folder / _MIRAX_INDEX).is_file():
        return None
    beside = (folder.with_name(folder.name + suffix) for suffix in (".mrxs", ".MRXS"))
    return next((path for path in beside if path.is_file()), None)


def _parts(index: Path) -> set[Path]:
    try:
        return {index.parent / name for name in named_files(index)} if is_hamamatsu_index(index) else set()
    except OSError:
        return set()  # it cannot be read: opening it says so
