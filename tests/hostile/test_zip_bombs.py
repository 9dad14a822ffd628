"""A checkpoint is a zip from a stranger too: one that is a bomb, or that contradicts itself, is refused before it takes memory."""

from __future__ import annotations

import ctypes
import io
import mmap
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pytest
from hostile.pickle_bombs import module, tensor, torch_file

from backend.errors import BlockBroken, CheckpointRefused, CheckpointUnreadable
from backend.inference.blocks import NativeBlocks
from backend.inference.bounded_zip import MAX_ENTRIES, MAX_RATIO, SMALL_BLOCK_BYTES, checked_zip, unpack
from backend.inference.checkpoint import is_stand_in
from backend.inference.unpickling import load_block

LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def zipped(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # of the same name twice, which is the point
        for name, data in entries:
            archive.writestr(name, data)
    return buffer.getvalue()


def patched(data: bytes, signature: bytes, offset: int, form: str, value: int, number: int = 0) -> bytes:
    """``data`` with a field of its ``number``-th header of a kind changed."""
    at = -1
    for _ in range(number + 1):
        at = data.index(signature, at + 1)
    changed = bytearray(data)
    struct.pack_into(form, changed, at + offset, value)
    return bytes(changed)


def says_bytes(data: bytes, size: int) -> bytes:
    """The first entry says that it has ``size`` bytes unpacked, in both of its headers."""
    return patched(patched(data, LOCAL, 22, "<I", size), CENTRAL, 24, "<I", size)


def opened(data: bytes, folder: Path) -> Any:
    path = folder / "model.pt.zip"
    path.write_bytes(data)
    assert not is_stand_in(path)
    return NativeBlocks(path, "cpu")


def test_zeros_that_would_fill_the_memory_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    data = zipped([("encoder.pt", bytes(SMALL_BLOCK_BYTES + 1))])
    with pytest.raises(
        CheckpointRefused, match=rf"'encoder' would unpack from 0\.0 MiB to 16 MiB.*{MAX_RATIO} times.*zip bomb"
    ):
        opened(data, tmp_path)


def test_a_block_larger_than_any_model_is_refused(tmp_path: Path) -> None:
    data = says_bytes(zipped([("encoder.pt", b"x")], zipfile.ZIP_STORED), 2**31 + 1)
    with pytest.raises(CheckpointRefused, match=r"'encoder' would unpack to 2\.0 GiB; a block has 2 GiB at most"):
        opened(data, tmp_path)


def test_a_block_that_says_less_than_it_holds_is_refused_where_it_goes_past_that(tmp_path: Path) -> None:
    data = says_bytes(zipped([("encoder.pt", bytes(64 * 2**20))]), 1000)
    with pytest.raises(CheckpointRefused, match="'encoder' unpacks to more than the 1000 bytes"):
        opened(data, tmp_path)


def test_a_block_that_says_more_than_it_holds_is_damaged(tmp_path: Path) -> None:
    data = says_bytes(zipped([("encoder.pt", b"x" * 1000)]), 8 * 2**20)
    with pytest.raises(BlockBroken, match="'encoder' is damaged inside the zip: it ends after 1000"):
        opened(data, tmp_path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("at", [45, 65])
def test_a_block_that_was_changed_on_the_way_is_not_loaded(method: int, at: int, tmp_path: Path) -> None:
    data = bytearray(zipped([("encoder.pt", bytes(range(256)) * 4)], method))
    data[at] ^= 0xFF
    # A changed byte of compressed data can mean anything, more bytes than there were too.
    with pytest.raises(
        (BlockBroken, CheckpointRefused), match=r"'encoder' (is damaged inside the zip|unpacks to more)"
    ):
        opened(bytes(data), tmp_path)


def test_an_empty_block_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(BlockBroken, match="'encoder' is damaged inside the zip: it is empty"):
        opened(zipped([("encoder.pt", b"")]), tmp_path)


def zip64_lies(packed: int) -> bytes:
    """An entry whose directory says the packed size in a field of Zip64."""
    entry = zipfile.ZipInfo("encoder.pt")
    entry.extra = struct.pack("<HHQ", 1, 8, packed)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(entry, b"x" * 100)
    return patched(patched(buffer.getvalue(), CENTRAL, 20, "<I", 0xFFFFFFFF), LOCAL, 18, "<I", 0xFFFFFFFF)


PAIR = zipped([("encoder.pt", b"x" * 100), ("grouper.pt", b"y" * 100)], zipfile.ZIP_STORED)
CONTRADICTIONS: dict[str, tuple[bytes, str]] = {
    "one name twice": (zipped([("encoder.pt", b"x"), ("encoder.pt", b"y")]), "'encoder.pt' twice"),
    "one name in capitals too": (zipped([("encoder.pt", b"x"), ("Encoder.PT", b"y")]), "'Encoder.PT' twice"),
    "one block in two folders": (zipped([("a/encoder.pt", b"x"), ("b/encoder.pt", b"y")]), "'encoder' is there twice"),
    "two entries in one place": (patched(PAIR, CENTRAL, 42, "<I", 0, number=1), "reaches into the next one"),
    "an entry that reaches into the next": (
        patched(patched(PAIR, CENTRAL, 20, "<I", 150), LOCAL, 18, "<I", 150),
        "'encoder.pt', that reaches into the next one",
    ),
    "an entry that reaches into the directory": (
        patched(patched(PAIR, CENTRAL, 20, "<I", 150, number=1), LOCAL, 18, "<I", 150, number=1),
        "'grouper.pt', that reaches into the next one",
    ),
    "two sizes": (patched(PAIR, LOCAL, 22, "<I", 99), "contradict each other"),
    "two methods": (patched(PAIR, LOCAL, 8, "<H", 8), "contradict each other"),
    "an encrypted entry": (patched(PAIR, CENTRAL, 8, "<H", 1), "an encrypted entry, 'encoder.pt'"),
    "an entry that only itself calls encrypted": (patched(PAIR, LOCAL, 6, "<H", 1), "contradict each other"),
    "a packed size of Zip64 past the end": (zip64_lies(2**40), "reaches into the next one"),
    "a packed size of Zip64 past everything": (zip64_lies(2**64 - 1), "reaches into the next one"),
    "another method of packing": (zipped([("encoder.pt", b"x" * 100)], zipfile.ZIP_LZMA), "packed with method 14"),
    "as many entries as no model": (patched(PAIR, END, 10, "<H", MAX_ENTRIES + 1), "a directory of"),
    "a directory as long as no model's": (patched(PAIR, END, 12, "<I", 5 * 2**20), "a directory of"),
}


@pytest.mark.parametrize(("data", "named"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_zip_that_no_program_packs_so_is_refused(data: bytes, named: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointRefused) as refused:
        opened(data, tmp_path)
    assert named in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK",
        PAIR[:-30],
        patched(PAIR, CENTRAL, 42, "<I", 7),
        patched(PAIR, CENTRAL, 6, "<H", 99),
        patched(PAIR, END, 16, "<I", 2**32 - 2),
        zip64_lies(100)[:-1],
    ],
    ids=lambda data: f"{len(data)} bytes, {zlib.crc32(data):08x}",
)
def test_what_is_no_zip_is_said_to_be_none(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnreadable, match="is not a zip file of blocks"):
        opened(data, tmp_path)


def test_a_bomb_in_the_zip_inside_the_zip_is_refused_too() -> None:
    """The file of ``torch.save`` is a zip itself. Torch never compresses in it, so that nothing in it can be larger than the whole."""
    opcodes = b"\x80\x04" + module(_buffers={"a": tensor(2**22, (2**22,), (1,))}) + b"."
    assert load_block(torch_file(opcodes, (bytes(2**24),)), "encoder").a.shape == (2**22,)
    with pytest.raises(CheckpointRefused, match=r"'encoder'.*compressed weights"):
        load_block(torch_file(opcodes, (bytes(2**24),), packed=True), "encoder")


def test_the_genuine_files_are_far_from_the_limit(test_data: Path) -> None:
    ratios = []
    for path in sorted((test_data / "checkpoints").glob("wsc-layout-*.pt.zip")):
        with checked_zip(path, path.name) as archive:
            ratios += [info.file_size / info.compress_size for info in archive.infolist()]
    assert len(ratios) == 6
    assert 1 < max(ratios) < MAX_RATIO / 3


def test_weights_are_in_memory_once(test_data: Path) -> None:
    """They are used where the block was unpacked, so that loading takes the block's size and no more."""
    path = test_data / "checkpoints" / "wsc-layout-1.6.pt.zip"
    with checked_zip(path, path.name) as archive:
        memory = unpack(archive, archive.getinfo("encoder.pt"), "encoder")
    assert isinstance(memory, mmap.mmap)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for parameter in load_block(memory, "encoder").parameters():
        assert start <= parameter.data_ptr() < start + len(memory)
