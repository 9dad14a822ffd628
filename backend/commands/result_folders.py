"""The folders that ``predict`` writes into: one for each slide, the same one for the same slide, and never that of
another slide.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from backend.errors import OutputUnusable, ResultDamaged, StoreUnavailable
from backend.results.bag import BAG_KEY, SLIDE_ID, BagResult, digest
from backend.results.export import whole_file
from backend.results.hdf5 import read_hdf5, write_hdf5
from backend.slides.dicom_series import is_dicom

RESULT = "result.h5"
_SUFFIX_LENGTHS = (8, 40)
_NAME_BYTES = 255 - 1 - max(_SUFFIX_LENGTHS)  # of the 255 of nearly all file systems
_PROBE_BYTES = 2**18


def slide_id(slide: Path) -> str:
    """40 hexadecimal digits that tell a slide from every other: of its real path."""
    return digest({"slide": os.path.realpath(slide)})


def check_writable(out: Path) -> None:
    """Make the folder ``out`` and write something there that is deleted again.

    Raises
    ------
    OutputUnusable
        It is a file or lies in one, may not be written, or its disk is full.
    """
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """What the system refuses, as :class:`~backend.errors.OutputUnusable`."""
    try:
        yield
    except (FileExistsError, NotADirectoryError) as error:
        there = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), folder)
        raise OutputUnusable(
            f"Results cannot be written to {folder}: {there} is no folder.", hint="Give a folder with --out."
        ) from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "Make room there, or give another folder with --out." if full else "Give another folder with --out."
        raise OutputUnusable(f"Results cannot be written to {folder}: {error.strerror}.", hint=hint) from error


class ResultFolders:
    """Chooses a folder below ``out`` for each slide of a call.

    It has the slide's name, where no other slide of the call or of an earlier one has the same; else a suffix that
    depends on the slide alone, so that neither order nor choice of the slides matters. A slide keeps the folder in
    which its results lie.

    Parameters
    ----------
    out
        The folder of ``--out``.
    slides
        All slides of the call.
    """

    def __init__(self, out: Path, slides: Iterable[Path]) -> None:
        self._out = out
        names = {os.path.realpath(slide): _name(slide).casefold() for slide in slides}
        self._slides_of_name = Counter(names.values())

    def choose(self, slide: Path) -> Path:
        """The folder of ``slide``, which need not be there.

        Raises
        ------
        OutputUnusable
            What is written there cannot be read, or every name is taken.
        """
        own, name = slide_id(slide), _name(slide)
        folders = [self._out / f"{_cut(name)}-{own[:length]}" for length in _SUFFIX_LENGTHS]
        plain = self._out / name
        with writing_to(self._out):
            for folder in (plain, *folders):
                if written_there(folder)[0] == own:
                    return folder
            if self._slides_of_name[name.casefold()] < 2:
                folders.insert(0, plain)
            free = [folder for folder in folders if _is_free(folder)]
        if not free:
            raise OutputUnusable(
                f"{plain} and {folders[-1]} hold other results.", hint="Give another folder with --out."
            )
        return free[0]

    def write(self, result: BagResult, slide: Path, folder: Path) -> Path:
        """Write ``result.h5`` into ``folder``; into another if another slide's results came there meanwhile. Returns
        the folder.

        Raises
        ------
        OutputUnusable
            The system refuses to write.
        """
        try:
            with writing_to(folder), whole_file(folder / RESULT) as temporary:
                write_hdf5(result, temporary)
                if written_there(folder)[0] != slide_id(slide):
                    _claim(temporary, folder / RESULT)
            return folder
        except _Taken:
            return self.write(result, slide, self.choose(slide))


class _Taken(Exception):
    """Another slide's result came to a place that was free."""


def _claim(temporary: Path, target: Path) -> None:
    # Two calls at a time may have chosen the same free name: only one of them makes this link.
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise _Taken from None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):  # these say that the file system has no links
            raise


def written_there(folder: Path) -> tuple[str, str]:
    """Of which slide (its :func:`slide_id`) and bag key the result in a folder is; ``""`` for what is not known or not
    there.
    """
    if not (folder / RESULT).is_file():
        return "", ""
    try:
        provenance = read_hdf5(folder / RESULT, latents=False).provenance
    except (FileNotFoundError, ResultDamaged):
        return "", ""
    except StoreUnavailable as error:
        raise OutputUnusable(
            f"{folder / RESULT} cannot be read: {error.message}", hint="Give another folder with --out."
        ) from error
    return str(provenance.get(SLIDE_ID, "")), str(provenance.get(BAG_KEY, ""))


def _is_free(folder: Path) -> bool:
    return not os.path.lexists(folder / RESULT) and (folder.is_dir() or not os.path.lexists(folder))


def _cut(name: str) -> str:
    """``name``, short enough for a suffix to follow."""
    while len(os.fsencode(name)) > _NAME_BYTES:
        name = name[:-1]
    return name


def _name(slide: Path) -> str:
    """The slide's name without its ending; for DICOM, whose files have numbers for names, that of its folder."""
    folder = Path(os.path.normpath(slide.absolute())).parent.name
    try:
        by_folder = bool(folder) and is_dicom(slide)
    except OSError:
        by_folder = False  # it cannot be read: that is said where it is opened
    return folder if by_folder else slide.stem
