"""The files that are opened together with a slide of several files: they too must lie where slides may come from.

OpenSlide opens what a slide's index names and what lies beside it. An index of one's own making could name any file of
this machine, and a link beside it could lead there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from backend.errors import SourceRefused
from backend.settings import Settings
from backend.slides.dicom_series import is_dicom, series_of
from backend.slides.places import shown

# The entries of Hamamatsu's .vms and .vmu, and of MIRAX' Slidedat.ini, that name files; always without a folder.
_NAMES_FILE = re.compile(
    rb"^\s*((?:FILE_|INDEXFILE|ImageFile|MapFile|OptimisationFile|MacroImage)[^=]*)=([^\n]*)", re.MULTILINE
)
# GLib, which reads these for OpenSlide, passes over more kinds of white space than we would, and knows escapes.
_NOT_IN_A_NAME = re.compile(rb"[\x00-\x1f\x7f/\\]")
_INDEX_MAX_BYTES = 2**24
_HAMAMATSU_MAX_BYTES = 2**17  # OpenSlide takes half of that


def companion_files(path: Path) -> list[Path]:
    """The other files of a slide that consists of several, sorted: what lies in the folder of a ``.mrxs``, what the
    index of a ``.vms`` or ``.vmu`` names, the series of a DICOM file. Files that are not there are left out.
    """
    if path.suffix.lower() == ".mrxs":
        folder = path.with_suffix("")
        return sorted(entry for entry in folder.iterdir() if entry.is_file()) if folder.is_dir() else []
    if is_hamamatsu_index(path):
        parts = (path.parent / name for name in named_files(path))
        return sorted(part for part in parts if part.is_file())
    return [part for part in series_of(path) if part != path] if is_dicom(path) else []


def named_files(index: Path) -> set[str]:
    """The names of files in an index of Hamamatsu's or MIRAX'. Those that lead into another folder are left out."""
    names = {name for name in _entries(index) if _is_name(name)}
    return {os.fsdecode(name) for name in names}


def check_companions(path: Path, settings: Settings) -> None:
    """Return if all that is opened together with ``path`` lies inside ``SLIDE_ROOTS``. A slide that was downloaded must
    be one file.

    Raises
    ------
    SourceRefused
        A link beside it leads out of the roots, or its index names a file in another folder.
    """
    ending = path.suffix.lower()
    index: Path | None = None
    if ending == ".mrxs":
        folder = path.with_suffix("")
        index = folder / "Slidedat.ini"
        beside: Iterable[Path] = [folder, *folder.iterdir()] if folder.is_dir() else []
    elif is_hamamatsu_index(path):
        index, beside = path, path.parent.iterdir()
        if not _inside(path, settings):
            raise SourceRefused(
                f"{shown(path.name)} was downloaded, and is the index of a slide of many files.",
                hint="Put the slide, with its folder, below SLIDE_ROOTS.",
            )
    elif is_dicom(path) and _inside(path, settings):
        beside = path.parent.iterdir()
    else:
        return
    for entry in beside:
        if entry.is_symlink() and not _inside(entry, settings):
            raise SourceRefused(
                f"{shown(entry.name)}, which is opened with {shown(path.name)}, leads outside the allowed folders.",
                hint="Remove the link, or add the folder it leads to to SLIDE_ROOTS.",
            )
    if index is not None and index.is_file():
        for name in _entries(index):
            if name and not _is_name(name):
                raise SourceRefused(
                    f"The index {shown(index.name)} names a file in another folder: {shown(name.decode(errors='replace'))}.",
                    hint="A slide's files lie in one folder. This index was not written by a scanner.",
                )


def is_hamamatsu_index(path: Path) -> bool:
    """Whether OpenSlide may take a file for a .vms or .vmu: it goes by what is in it, not by its name."""
    return path.stat().st_size <= _HAMAMATSU_MAX_BYTES and b"Virtual Microscope Specimen]" in _start_of(path)


def _entries(index: Path) -> Iterable[bytes]:
    for match in _NAMES_FILE.finditer(_start_of(index)):
        yield match[2].strip(b" \t").removesuffix(b"\r").strip(b" \t")


def _is_name(entry: bytes) -> bool:
    return entry not in (b"", b".", b"..") and not _NOT_IN_A_NAME.search(entry)


def _start_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_INDEX_MAX_BYTES)


def _inside(path: Path, settings: Settings) -> bool:
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(root) for root in settings.slide_roots)
