"""A look at a TIFF's directories before a C library gets the file: tiles and lengths that cannot be are refused here.

OpenSlide makes room for a tile by what the directory says, and glib ends the process where a computer does not have that much: a directory that
speaks of tiles of a million pixels, or of a tile of a terabyte, would take the worker (or the server) with it.

Sources: TIFF 6.0; BigTIFF as libtiff reads it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from backend.errors import SlideUnreadable

# 128 MiB decoded, which is what OpenSlide's cache of a slide holds: a larger tile would be decoded again for each block that touches it, so one
# picture could take hours. Real ones have 2**16 to 2**24.
TILE_MAX_PIXELS = 2**25

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _STRIP_LENGTHS, _TILE_LENGTHS = 256, 257, 322, 323, 279, 325
_INTEGER_TYPES = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_LISTED_BYTES = 6  # the least by which a tile is listed: an offset (4 bytes) and a length (2)
_LARGE_TILE_PIXELS = 2**18
_MAX_DIRECTORIES = 10_000
_MAX_ENTRIES = 65_536


def check_tiff(path: Path) -> None:
    """Return if ``path`` is no TIFF, or one whose tiles are possible.

    Raises
    ------
    SlideUnreadable
        A tile is larger than :data:`TILE_MAX_PIXELS` or than the file, or fewer tiles are listed than the size needs.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        for number, directory in enumerate(_directories(file, size)):
            if reason := _impossible(directory, size):
                raise SlideUnreadable(
                    f"{path.name} is damaged: in its directory {number} {reason}.",
                    hint="Copy the slide again. If it was written with tiles of more than 33 million pixels, write it with smaller ones.",
                )


@dataclass
class _Field:
    """What is kept of a tag: its largest value, and how many values it has."""

    largest: int
    count: int


def _impossible(directory: dict[int, _Field], size: int) -> str:
    """What cannot be about a directory of a file of ``size`` bytes, in words; empty if nothing."""
    longest = max((directory[tag].largest for tag in (_STRIP_LENGTHS, _TILE_LENGTHS) if tag in directory), default=0)
    if longest > size:
        return f"a tile has {longest} bytes, and the whole file {size}"
    if not {_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT} <= directory.keys():
        return ""
    width, height, tile_w, tile_h = (directory[tag].largest for tag in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
    if tile_w * tile_h > TILE_MAX_PIXELS:
        return f"a tile has {tile_w} x {tile_h} pixels"
    if min(tile_w, tile_h) < 1:
        return ""
    # libtiff fills a list that is too short with tiles that are missing, and all of them would be read: for hours, if the size is a lie.
    tiles = math.ceil(width / tile_w) * math.ceil(height / tile_h)
    listed = directory[_TILE_LENGTHS].count if _TILE_LENGTHS in directory else 0
    if listed < tiles:
        return f"{width} x {height} pixels make {tiles} tiles, and {listed} are listed"
    # Tiles larger than any scanner's count as several: an empty one of theirs has a few hundred bytes, and these would have none.
    if width * height / _LARGE_TILE_PIXELS * _LISTED_BYTES > size:
        return f"{width} x {height} pixels are said to be in {size} bytes"
    return ""


def _directories(file: BinaryIO, size: int) -> Iterator[dict[int, _Field]]:
    """Of each directory the tags that are looked at here. What is no TIFF, or breaks off, has none (any more)."""
    head = file.read(16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    if order is None or len(head) < 16:
        return
    version = struct.unpack_from(order + "H", head, 2)[0]
    if version not in (42, 43):
        return
    big = version == 43
    if not big and size > 2**32:
        return  # Hamamatsu's NDPI, whose links have more bits than a TIFF's: they would be misread here
    link, count_format, entry_bytes = ("Q", "Q", 20) if big else ("I", "H", 12)
    link_bytes, inline = struct.calcsize(link), 8 if big else 4
    at: int = struct.unpack_from(order + link, head, 8 if big else 4)[0]
    seen: set[int] = set()
    while at and at not in seen and len(seen) < _MAX_DIRECTORIES:
        seen.add(at)
        start = at + struct.calcsize(count_format)
        raw = _read(file, at, start - at, size)
        if raw is None:
            return
        entries: int = struct.unpack(order + count_format, raw)[0]
        body = _read(file, start, entries * entry_bytes, size) if entries <= _MAX_ENTRIES else None
        if body is None:
            return
        directory: dict[int, _Field] = {}
        for i in range(entries):
            tag, kind = struct.unpack_from(order + "HH", body, i * entry_bytes)
            if tag not in (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _STRIP_LENGTHS, _TILE_LENGTHS):
                continue
            if kind not in _INTEGER_TYPES:
                continue  # libtiff does not read it either
            dtype = np.dtype(order + _INTEGER_TYPES[kind])
            count: int = struct.unpack_from(order + link, body, i * entry_bytes + 4)[0]
            field = i * entry_bytes + 4 + link_bytes
            if count * dtype.itemsize <= inline:
                values = np.frombuffer(body, dtype, count, field)
            else:
                where: int = struct.unpack_from(order + link, body, field)[0]
                # One that goes on beyond the end is read as far as it goes, as libtiff may.
                data = _read(file, where, min(count * dtype.itemsize, max(0, size - where)), size) or b""
                values = np.frombuffer(data, dtype, len(data) // dtype.itemsize)
            if len(values):
                before = directory.get(tag, _Field(0, 0))
                directory[tag] = _Field(max(before.largest, int(values.max())), max(before.count, len(values)))
        yield directory
        tail = _read(file, start + entries * entry_bytes, link_bytes, size)
        at = struct.unpack(order + link, tail)[0] if tail is not None else 0


def _read(file: BinaryIO, at: int, length: int, size: int) -> bytes | None:
    """``length`` bytes from ``at``; ``None`` if the file of ``size`` bytes does not hold them."""
    if at + length > size:
        return None
    file.seek(at)
    return file.read(length)
