"""The files of one DICOM slide: images of a slide (by SOP class) that share a folder and a SeriesInstanceUID, as
OpenSlide puts them together.

A series holds a file for each level, and often label, overview and thumbnail. OpenSlide opens the slide by any of them.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from backend.errors import SlideUnreadable
from backend.paths import StrPath
from backend.slides.dicom_header import DicomHeader, read_header

_REMEMBERED = 16_384
_NO_LEVEL = frozenset(("LABEL", "OVERVIEW", "THUMBNAIL", "LOCALIZER"))

Series = Mapping[Path, DicomHeader]


def is_dicom(path: StrPath) -> bool:
    """Whether a file says that it is DICOM: ``DICM`` stands at byte 128 (PS3.10, 7.1)."""
    with Path(path).open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def header_of(path: Path) -> DicomHeader | None:
    """The header of a file; ``None`` if it is no DICOM, or one whose header is damaged. Remembered until its size or
    modification time changes.
    """
    status = path.stat()
    return _header(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_REMEMBERED)
def _header(path: str, _size: int, _mtime_ns: int) -> DicomHeader | None:
    try:
        return read_header(Path(path))
    except SlideUnreadable:
        return None


def series_in(folder: Path) -> dict[str, dict[Path, DicomHeader]]:
    """The slides' series in a folder, by SeriesInstanceUID, their files by name. A file without that UID is a series of
    its own.
    """
    found: dict[str, dict[Path, DicomHeader]] = {}
    for name, header in _slide_images(folder):
        found.setdefault(header.series_uid or name, {})[folder / name] = header
    return found


def series_of(path: Path) -> Series:
    """The files of the series of ``path``, in its folder; none if its header cannot be read or it shows no slide."""
    header = header_of(path)
    if header is None or not header.is_whole_slide:
        return {}
    if not header.series_uid:
        return {path: header}
    images = _slide_images(path.parent)
    return {path.parent / name: other for name, other in images if other.series_uid == header.series_uid}


def _slide_images(folder: Path) -> Iterator[tuple[str, DicomHeader]]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        try:
            status = entry.stat()  # one for each file: an archive's folder may hold thousands, on a network share
            is_file = stat.S_ISREG(status.st_mode)
            header = _header(entry.path, status.st_size, status.st_mtime_ns) if is_file else None
        except OSError:  # it is gone meanwhile, or may not be read: OpenSlide cannot use it either
            continue
        if header is not None and header.is_whole_slide:
            yield entry.name, header


def slide_instance(path: Path) -> str:
    """The SOPInstanceUID of the finest level of the slide that a file belongs to: the same for all files and copies of
    it. ``""`` if there is none.
    """
    series = series_of(path)
    opening = opening_file(series)
    return series[opening].instance_uid if opening is not None else ""


def opening_file(series: Series) -> Path | None:
    """The file by which a series is opened: its finest level, first by name of equals; ``None`` if it has no level,
    only a label or the like.
    """
    levels = {path: header for path, header in series.items() if _NO_LEVEL.isdisjoint(header.image_type)}
    if not levels:
        return None
    return min(
        levels, key=lambda path: (-levels[path].total_columns * levels[path].total_rows, path.is_symlink(), path)
    )
