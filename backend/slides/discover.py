"""Finding slides in folders: one path for each slide, however many files it consists of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from backend.errors import SlideNotFound

# What OpenSlide 4 reads by these endings, and plain images. A slide of another name can always be given as a file.
SLIDE_SUFFIXES = frozenset(
    (
        ".svs",
        ".tif",
        ".tiff",
        ".ndpi",
        ".vms",
        ".vmu",
        ".scn",
        ".mrxs",
        ".svslide",
        ".bif",
        ".czi",
        ".dcm",
        ".jpg",
        ".jpeg",
        ".png",
    )
)


def find_slides(paths: Iterable[Path]) -> list[Path]:
    """The slides among ``paths``: files as they are given, folders searched with their subfolders.

    A folder's DICOM files (``.dcm``) count as one slide, opened by the first of them; the files in the companion folder of a
    ``.mrxs`` are part of it. Hidden files and folders are passed over.

    Raises
    ------
    SlideNotFound
        A path does not exist, or there is no slide in any of them.
    """
    found: dict[Path, None] = {}
    given = list(paths)
    for path in given:
        if path.is_dir():
            found.update(dict.fromkeys(_in_folder(path)))
        elif path.exists():
            found[path] = None
        else:
            raise SlideNotFound(f"There is no file or folder {path}.")
    if not found:
        raise SlideNotFound(
            f"No slide was found in {', '.join(map(str, given)) or 'nothing'}.",
            hint=f"Slides are looked for by their endings: {', '.join(sorted(SLIDE_SUFFIXES))}.",
        )
    return list(found)


def _in_folder(folder: Path) -> Iterator[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    companions = {entry.with_suffix("") for entry in entries if entry.suffix.lower() == ".mrxs"}
    dicom_seen = False
    for entry in entries:
        if entry.is_dir():
            if entry not in companions:
                yield from _in_folder(entry)
        elif entry.suffix.lower() == ".dcm":
            if not dicom_seen:
                yield entry
            dicom_seen = True
        elif entry.suffix.lower() in SLIDE_SUFFIXES:
            yield entry
