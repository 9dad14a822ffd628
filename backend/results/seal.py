"""The seal at the end of a result file: a digest over what the file says, looked at before HDF5 sees any of it.

HDF5 checks the numbers of its chunks, and little of what says where they lie: one flipped bit there makes the library crash, search for ever or
read something else without a word. HDF5 itself stops reading where its data end, so that every tool opens a sealed file as it is.

Layout, integers little-endian: ``embedding`` (float32, the slide embedding once more, so that it can be read alone) · ``about`` (JSON: ``sha256``
of the file's first ``bytes`` bytes but for the ranges ``but``; ``summary``, what is shown of many results at once, which earlier files lack) · uint32 length of ``embedding`` · uint32 length of ``about`` · SHA-256 of all of these · ``WSCseal1``.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from backend.results.bag import Float32Array

_MAGIC = b"WSCseal1"
_END = struct.Struct("<II32s8s")
_MAX_BYTES = 2**20
_PIECE_BYTES = 2**20

Range = tuple[int, int]
"""First byte and the one after the last."""


@dataclass(frozen=True)
class Seal:
    """What the end of a file says of it.

    Attributes
    ----------
    embedding
        float32 (D,): the slide embedding.
    size
        Bytes before the seal.
    but
        Ranges that the digest leaves out, in their order: they have checksums of their own.
    sha256
        Hexadecimal digest of the rest.
    summary
        What is shown of many results at once, JSON values; ``None`` in earlier files.
    """

    embedding: Float32Array
    size: int
    but: tuple[Range, ...]
    sha256: str
    summary: Mapping[str, Any] | None = None

    def ranges(self) -> list[Range]:
        """Where the bytes lie that the digest covers, none of them empty."""
        return [(first, after) for first, after in _between(self.size, self.but) if after > first]

    def check(self, file: BinaryIO) -> None:
        """Return if ``file`` is what was sealed, as far as the digest goes; ``ValueError`` if not."""
        if _digest(file, self.size, self.but) != self.sha256:
            raise ValueError("its contents do not match their digest")


def make_seal(
    file: BinaryIO, embedding: Float32Array, but: Sequence[Range], summary: Mapping[str, Any] | None = None
) -> bytes:
    """The bytes to append to ``file``, which is read from its start to its end."""
    size = file.seek(0, os.SEEK_END)
    joined = _joined(but)
    said = {"bytes": size, "but": joined, "sha256": _digest(file, size, joined)}
    about = json.dumps({**said, "summary": summary} if summary is not None else said).encode()
    vector = np.ascontiguousarray(embedding, "<f4").tobytes()
    sizes = struct.pack("<II", len(vector), len(about))
    return vector + about + sizes + hashlib.sha256(vector + about + sizes).digest() + _MAGIC


def read_seal(file: BinaryIO, *, before: int = 0) -> Seal:
    """The seal of a file, itself checked; ``ValueError`` if there is none.

    ``file`` may be only the file's end, without its first ``before`` bytes.
    """
    end = file.seek(0, os.SEEK_END)
    if end < _END.size:
        raise ValueError("it is too short")
    file.seek(end - _END.size)
    vector_bytes, about_bytes, digest, magic = _END.unpack(file.read(_END.size))
    start = end - _END.size - vector_bytes - about_bytes
    if magic != _MAGIC or start < 0 or vector_bytes + about_bytes > _MAX_BYTES:
        raise ValueError("it does not end as a result does")
    file.seek(start)
    text = file.read(vector_bytes + about_bytes)
    if hashlib.sha256(text + struct.pack("<II", vector_bytes, about_bytes)).digest() != digest:
        raise ValueError("its end does not match its digest")
    about = json.loads(text[vector_bytes:])
    but = tuple((int(first), int(after)) for first, after in about["but"])
    if (
        about["bytes"] != before + start
        or but != tuple(_joined(but))
        or (but and (but[0][0] < 0 or but[-1][1] > before + start))
    ):
        raise ValueError("its end is about another file")
    embedding, summary = np.frombuffer(text[:vector_bytes], "<f4").astype(np.float32), about.get("summary")
    return Seal(embedding, before + start, but, str(about["sha256"]), summary if isinstance(summary, dict) else None)


def _digest(file: BinaryIO, size: int, but: Sequence[Range]) -> str:
    digest = hashlib.sha256()
    for first, after in _between(size, but):
        file.seek(first)
        while first < after:
            piece = file.read(min(_PIECE_BYTES, after - first))
            if not piece:
                raise ValueError("it is truncated")
            digest.update(piece)
            first += len(piece)
    return digest.hexdigest()


def _between(size: int, but: Sequence[Range]) -> Iterator[Range]:
    at = 0
    for first, after in but:
        yield at, first
        at = after
    yield at, size


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Ranges in their order, those that touch made one."""
    joined: list[Range] = []
    for first, after in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(after, joined[-1][1]))
        else:
            joined.append((first, after))
    return joined
