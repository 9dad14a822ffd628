"""The files of one DICOM slide: images of a slide (by SOP class) that share a folder and a SeriesInstanceUID, as OpenSlide puts them together.

A series holds a file for each level, and often label, overview and thumbnail. OpenSlide opens the slide by any level; not by its label.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """The header of a file; ``None`` if it is no DICOM, or one whose header is damaged. Remembered until its size or modification time changes."""
    status = path.stat()
    return _header(str(path), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=_REMEMBERED)
def _header(path: str, _size: int, _mtime_ns: int) -> DicomHeader | None:
    try:
        return read_header(Path(path))
    except SlideUnreadable:
        return None


def series_in(folder: Path) -> dict[str, dict[Path, DicomHeader]]:
    """The slides' series in a folder, by SeriesInstanceUID, their files by name. A file without that UID is a series of its own."""
    found: dict[str, dict[Path, DicomHeader]] = {}
    for entry in sorted(folder.iterdir()):
        try:
            header = header_of(entry) if entry.is_file() else None
        except OSError:  # it is gone meanwhile, or may not be read: OpenSlide cannot use it either
            continue
        if header is not None and header.is_whole_slide:
            found.setdefault(series_key(entry, header), {})[entry] = header
    return found


def series_key(path: Path, header: DicomHeader) -> str:
    """What the files of one slide in a folder share."""
    return header.series_uid or path.name


def series_files(path: Path) -> list[Path]:
    """The files in the folder of ``path`` that are of its series, sorted; only itself if its header cannot be read or it shows no slide."""
    header = header_of(path)
    if header is None or not header.is_whole_slide:
        return [path]
    return list(series_in(path.parent).get(series_key(path, header), {path: header}))


def slide_instance(path: Path) -> str:
    """The SOPInstanceUID of the finest level of the slide that a file belongs to: the same for all files and copies of it. ``""`` if there is none."""
    header = header_of(path)
    if header is None or not header.is_whole_slide:
        return ""
    series = series_in(path.parent).get(series_key(path, header), {})
    opening = opening_file(series)
    return series[opening].instance_uid if opening is not None else ""


def opening_file(series: Series) -> Path | None:
    """The file by which a series is opened: its finest level, first by name of equals; ``None`` if it has no level, only a label or the like."""
    levels = {path: header for path, header in series.items() if _NO_LEVEL.isdisjoint(header.image_type)}
    if not levels:
        return None
    return min(
        levels, key=lambda path: (-levels[path].total_columns * levels[path].total_rows, path.is_symlink(), path)
    )
