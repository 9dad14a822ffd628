"""Zip files from strangers: looked at as a whole before anything is unpacked, and unpacked only as far as a stated limit.

The headers of a zip are claims. Here the claims must agree with each other (each entry lies in a place of its own, and no two have one
name), and what they say about sizes is a limit for the unpacking, never a reason to believe it. Imports neither torch nor mmm.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from backend.errors import BlockBroken, CheckpointRefused

# WSC's largest block has 0.11 GB; the largest Swin transformer would have 0.8 GB.
MAX_BLOCK_BYTES = 2 * 2**30
# Trained weights are close to noise: deflate takes off a tenth. Rounded random weights unpack to 9 times their packed size, zeros to 1030
# times. A block of ones and zeros (norms as they were initialised) may be all there is to a small one, which does no harm either.
MAX_RATIO = 32
SMALL_BLOCK_BYTES = 16 * 2**20
# An encoder has some 240 entries. The directory is read before anything in it can be judged, and takes ten times its size in memory.
MAX_ENTRIES = 20_000
MAX_DIRECTORY_BYTES = 4 * 2**20

_CHUNK_BYTES = 2**20
_LOCAL_HEADER = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # by password, by certificate, and with a masked directory
_SIZES_FOLLOW = 0x8  # the sizes stand after the entry's data; those in its own header are empty
_IN_ZIP64_FIELD = 0xFFFFFFFF
# All that reading a zip file may raise where the file is wrong: besides its own errors, those of seeking and decoding what headers say.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, OverflowError, RuntimeError)


@contextmanager
def checked_zip(file: Path | IO[bytes] | mmap.mmap, what: str) -> Iterator[zipfile.ZipFile]:
    """A zip file open for reading, whose directory is in order.

    Parameters
    ----------
    file
        Its path, or the open file.
    what
        What to call it in an error, such as ``Block 'encoder'``.

    Raises
    ------
    zipfile.BadZipFile
        It is no zip file, or a damaged one, or cannot be read.
    CheckpointRefused
        It is put together in a way that no program packs a model: too many entries, one name twice, entries that overlap or are
        encrypted, or sizes that contradict each other.
    """
    try:
        _check_directory_size(file, what)
        archive = zipfile.ZipFile(file)  # type: ignore[arg-type]  # a memory map is file enough
        try:
            _check_entries(archive, what)
        except BaseException:
            archive.close()
            raise
    except ZIP_ERRORS as error:
        raise zipfile.BadZipFile(str(error)) from error
    with archive:
        yield archive


def unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo, block: str) -> mmap.mmap:
    """Unpack one block into memory that belongs to it alone.

    Parameters
    ----------
    archive
        From :func:`checked_zip`.
    info
        The block's entry in it.
    block
        The block's name, for the errors.

    Returns
    -------
    mmap.mmap
        Anonymous private memory of exactly the block's size in bytes. Pages that were never written take no room, so that an entry that
        holds less than it says costs what it holds.

    Raises
    ------
    CheckpointRefused
        The block would be larger than :data:`MAX_BLOCK_BYTES` or than :data:`MAX_RATIO` times its packed size, or it unpacks to more
        than it says.
    BlockBroken
        The entry is empty or damaged.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        _refuse(
            f"Block {block!r} is packed with method {info.compress_type}",
            "Pack the blocks again, with deflate or not at all.",
        )
    if info.file_size > MAX_BLOCK_BYTES:
        _refuse(
            f"Block {block!r} would unpack to {info.file_size / 2**30:.1f} GiB; a block has {MAX_BLOCK_BYTES / 2**30:.0f} GiB at most",
            "Do not use this file. Get the checkpoint from its publisher again.",
        )
    if info.file_size > max(SMALL_BLOCK_BYTES, MAX_RATIO * info.compress_size):
        _refuse(
            f"Block {block!r} would unpack from {info.compress_size / 2**20:.1f} MiB to {info.file_size / 2**20:.0f} MiB; weights hardly"
            f" compress, and more than {MAX_RATIO} times is taken for a zip bomb",
            "Get the checkpoint from its publisher again; if you made it yourself, pack the blocks without compression.",
        )
    try:
        if not info.file_size:
            raise EOFError("it is empty")
        memory = mmap.mmap(-1, info.file_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        checksum = 0
        for chunk in _inflated(archive, info, block):
            if memory.tell() + len(chunk) > info.file_size:
                _refuse(f"Block {block!r} unpacks to more than the {info.file_size} bytes that its entry says")
            memory.write(chunk)
            checksum = zlib.crc32(chunk, checksum)
        if memory.tell() != info.file_size:
            raise EOFError(f"it ends after {memory.tell()} of {info.file_size} bytes")
        if checksum != info.CRC:
            raise zipfile.BadZipFile("its checksum is another")
    except ZIP_ERRORS as error:
        raise BlockBroken(f"Block {block!r} is damaged inside the zip: {error}.", hint="Download it again.") from error
    memory.seek(0)
    return memory


def _inflated(archive: zipfile.ZipFile, info: zipfile.ZipInfo, block: str) -> Iterator[bytes]:
    """An entry's bytes in chunks of at most :data:`_CHUNK_BYTES`.

    The standard library's own reader stops silently at the size that the directory says; this one goes to the end of what is there.
    """
    start, file = data_offset(archive, info, f"Block {block!r}"), archive.fp
    assert file is not None
    file.seek(start)
    left = info.compress_size
    inflater = zlib.decompressobj(-zlib.MAX_WBITS) if info.compress_type == zipfile.ZIP_DEFLATED else None
    while left:
        packed = file.read(min(_CHUNK_BYTES, left))
        if not packed:
            raise EOFError("the file ends in it")
        left -= len(packed)
        if inflater is None:
            yield packed
            continue
        while packed and not inflater.eof:
            yield inflater.decompress(packed, _CHUNK_BYTES)
            packed = inflater.unconsumed_tail
    if inflater is not None:
        while rest := inflater.decompress(inflater.unconsumed_tail, _CHUNK_BYTES):
            yield rest
        if not inflater.eof:
            raise EOFError("its compressed data have no end")


def _check_directory_size(file: Any, what: str) -> None:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return _check_directory_size(opened, what)
    # The end of a zip, as the standard library finds it: the same function that it then reads the directory by.
    end: list[Any] | None = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    file.seek(0)
    if not end:
        raise zipfile.BadZipFile("File is not a zip file")
    entries, directory_bytes = end[4], end[5]
    if entries > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        _refuse(f"{what} has a directory of {entries} entries in {directory_bytes} bytes")
    return None


def _check_entries(archive: zipfile.ZipFile, what: str) -> None:
    names = set()
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    following = [*(info.header_offset for info in infos[1:]), archive.start_dir]
    for info, end in zip(infos, following, strict=True):
        # Other readers do not tell capitals apart, so the same name in capitals would be another block to them.
        name = info.filename.lower()
        if name in names:
            _refuse(f"{what} has the entry {info.filename!r:.60} twice")
        names.add(name)
        if info.flag_bits & _ENCRYPTED:
            _refuse(
                f"{what} has an encrypted entry, {info.filename!r:.60}",
                "Unpack it with its password and pack the blocks again.",
            )
        if data_offset(archive, info, what) + info.compress_size > end:
            _refuse(f"{what} has an entry, {info.filename!r:.60}, that reaches into the next one")


def data_offset(archive: zipfile.ZipFile, info: zipfile.ZipInfo, what: str) -> int:
    """Where in its file an entry's packed bytes begin, by the entry's own header, which must not contradict the directory."""
    file: Any = archive.fp
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER.size)
    signature, _, flags, method, _, _, crc, packed, unpacked, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"there is no entry {info.filename!r:.60} where the directory says")
    sizes_here = not flags & _SIZES_FOLLOW and _IN_ZIP64_FIELD not in (packed, unpacked)
    differs = sizes_here and (crc, packed, unpacked) != (info.CRC, info.compress_size, info.file_size)
    if differs or flags & _ENCRYPTED or method != info.compress_type:
        _refuse(f"{what} has an entry, {info.filename!r:.60}, whose two headers contradict each other")
    return int(info.header_offset) + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


def _refuse(why: str, hint: str = "Do not use this file. Get the checkpoint from its publisher again.") -> NoReturn:
    raise CheckpointRefused(f"{why}.", hint=hint)
