"""The file that ``torch.save`` writes around a block's pickle: the weights, read without torch's own reader.

Each storage is an entry of its own in a zip, never compressed, so that it can be used where it lies. Torch's reader would also inflate
compressed ones, however large, and finds its way by other headers than the standard library does.
"""

from __future__ import annotations

import mmap
import sys
import zipfile
from dataclasses import dataclass

import torch

from backend.errors import BlockBroken, CheckpointRefused
from backend.inference.block_rules import refuse
from backend.inference.bounded_zip import data_offset

STORAGE_TYPES = {
    f"{name}Storage": dtype
    for name, dtype in (
        ("Double", torch.float64),
        ("Float", torch.float32),
        ("Half", torch.float16),
        ("BFloat16", torch.bfloat16),
        ("Long", torch.int64),
        ("Int", torch.int32),
        ("Short", torch.int16),
        ("Char", torch.int8),
        ("Byte", torch.uint8),
        ("Bool", torch.bool),
    )
}
_ALIGNMENT_BYTES = 64  # torch's own, in memory and in its files


@dataclass(frozen=True)
class StorageType:
    """``torch.FloatStorage`` and the like, which a file names to say what kind of numbers a storage holds."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Storage:
    """Numbers of one kind, in a row. Not given to anything but a tensor."""

    numbers: torch.Tensor


class Records:
    """The zip that ``torch.save`` wrote: a pickle, and each storage in an entry of its own, not compressed.

    Storages share the memory that the file lies in, where that is aligned; the file is in memory once.
    """

    def __init__(self, archive: zipfile.ZipFile, memory: mmap.mmap, block: str) -> None:
        self._memory = memory
        self._storages: dict[str, Storage] = {}
        self._places: dict[str, tuple[int, int]] = {}
        folders = set()
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                refuse("compressed weights, which torch.save never writes")
            folder, _, name = info.filename.partition("/")
            folders.add(folder)
            self._places[name] = data_offset(archive, info, f"Block {block!r}"), info.file_size
        if len(folders) != 1:
            raise BlockBroken(f"Block {block!r} is not a file of torch.save: it has {len(folders)} folders.")
        if "constants.pkl" in self._places:
            raise CheckpointRefused(
                f"Block {block!r} is a TorchScript archive, which is code.", hint="Use the file with pickled modules."
            )
        if "data.pkl" not in self._places:
            raise BlockBroken(f"Block {block!r} is not a file of torch.save: it has no data.pkl.")
        if "byteorder" in self._places and self.read("byteorder") != sys.byteorder.encode():
            raise BlockBroken(f"Block {block!r} was written on a machine with another byte order.")

    def read(self, name: str) -> bytes:
        """One entry's bytes, copied."""
        start, size = self._places[name]
        return self._memory[start : start + size]

    def storage(self, key: str, dtype: torch.dtype, count: int) -> Storage:
        """The storage ``key`` of exactly ``count`` numbers; the same object each time."""
        if key not in self._storages:
            start, size = self._places[f"data/{key}"]
            if size % dtype.itemsize:
                refuse("a storage of another size than it says")
            if not size:
                numbers = torch.empty(0, dtype=dtype)
            elif start % _ALIGNMENT_BYTES:
                numbers = torch.frombuffer(bytearray(self.read(f"data/{key}")), dtype=dtype)
            else:
                numbers = torch.frombuffer(self._memory, dtype=dtype, count=size // dtype.itemsize, offset=start)
            self._storages[key] = Storage(numbers)
        found = self._storages[key]
        if found.numbers.dtype != dtype or found.numbers.numel() != count:
            refuse("a storage of another size than it says")
        return found
