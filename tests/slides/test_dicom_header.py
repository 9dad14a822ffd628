"""The header of a DICOM file, in each of the ways in which headers are written."""

from __future__ import annotations

import random
import struct
import zlib
from pathlib import Path

import pytest

from backend.errors import SlideUnreadable
from backend.slides.dicom_header import WHOLE_SLIDE, read_header

Element = tuple[int, str, bytes]
UNDEFINED = 0xFFFFFFFF
SPACING: Element = (0x00280030, "DS", b"0.00025\\0.0005")


def encoded(elements: list[Element], order: str = "<", *, explicit: bool = True) -> bytes:
    data = b""
    for tag, vr, value in elements:
        value += b" " * (len(value) % 2)
        data += struct.pack(order + "HH", tag >> 16, tag & 0xFFFF)
        if not explicit:
            data += struct.pack(order + "I", len(value))
        elif vr in ("SQ", "OB", "UN"):
            data += vr.encode() + b"\0\0" + struct.pack(order + "I", len(value))
        else:
            data += vr.encode() + struct.pack(order + "H", len(value))
        data += value
    return data


def item(content: bytes, order: str, *, defined: bool) -> bytes:
    length = len(content) if defined else UNDEFINED
    end = b"" if defined else struct.pack(order + "HHI", 0xFFFE, 0xE00D, 0)
    return struct.pack(order + "HHI", 0xFFFE, 0xE000, length) + content + end


def sequence(tag: int, content: bytes, order: str, *, explicit: bool, defined: bool) -> bytes:
    inside = item(content, order, defined=defined)
    if defined:
        return encoded([(tag, "SQ", inside)], order, explicit=explicit)
    head = struct.pack(order + "HH", tag >> 16, tag & 0xFFFF) + (b"SQ\0\0" if explicit else b"")
    return head + struct.pack(order + "I", UNDEFINED) + inside + struct.pack(order + "HHI", 0xFFFE, 0xE0DD, 0)


def dicom(syntax: str = "1.2.840.10008.1.2.1", *, defined: bool = True) -> bytes:
    """A slide's file as this transfer syntax writes it, with sequences of defined or undefined length."""
    order, explicit = (">" if syntax.endswith(".1.2.2") else "<"), syntax != "1.2.840.10008.1.2"
    kind = {"explicit": explicit, "defined": defined}
    body = encoded(
        [
            (0x00080008, "CS", b"ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
            (0x00080016, "UI", WHOLE_SLIDE.encode()),
            (0x00080060, "CS", b"SM"),
        ],
        order,
        explicit=explicit,
    )
    # What is inside another sequence is that one's: it must not be taken for the file's own.
    body += sequence(0x00081115, encoded([(0x0020000E, "UI", b"9.9")], order, explicit=explicit), order, **kind)
    body += encoded(
        [
            (0x00100020, "LO", "Müller".encode()),
            (0x0020000D, "UI", b"1.2\0"),
            (0x0020000E, "UI", b"1.3\0"),
            (0x00280002, "US", struct.pack(order + "H", 3)),
            (0x00280008, "IS", b"12"),
            (0x00480006, "UL", struct.pack(order + "I", 40_000)),
        ],
        order,
        explicit=explicit,
    )
    measures = sequence(0x00289110, encoded([SPACING], order, explicit=explicit), order, **kind)
    body += sequence(0x52009229, measures, order, **kind)
    body += encoded([(0x7FE00010, "OB", b"\0" * 64)], order, explicit=explicit)
    if syntax.endswith(".99"):
        packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
        body = packer.compress(body) + packer.flush()
    meta = encoded([(0x00020002, "UI", WHOLE_SLIDE.encode()), (0x00020010, "UI", syntax.encode())])
    return bytes(128) + b"DICM" + encoded([(0x00020000, "UL", struct.pack("<I", len(meta)))]) + meta + body


@pytest.mark.parametrize("defined", [True, False], ids=["lengths", "delimiters"])
@pytest.mark.parametrize("ending", ["", ".1", ".2", ".1.99", ".4.50"])
def test_a_header_reads_the_same_in_every_transfer_syntax(tmp_path: Path, ending: str, defined: bool) -> None:
    (tmp_path / "a").write_bytes(dicom("1.2.840.10008.1.2" + ending, defined=defined))
    header = read_header(tmp_path / "a")
    assert header.is_whole_slide and header.sop_class_name == "VL Whole Slide Microscopy Image"
    assert header.image_type == ("ORIGINAL", "PRIMARY", "VOLUME", "NONE")
    assert (header.study_uid, header.series_uid, header.modality) == ("1.2", "1.3", "SM")
    assert header.patient_id == "Müller"
    assert (header.samples_per_pixel, header.frames, header.total_columns) == (3, 12, 40_000)
    assert header.pixel_spacing_um == pytest.approx((0.5, 0.25))  # between columns, then between rows
    assert header.transfer_syntax == "1.2.840.10008.1.2" + ending


def test_what_is_no_header_is_said(tmp_path: Path) -> None:
    sound = dicom(defined=False)
    (tmp_path / "text").write_text("hello " * 100)
    with pytest.raises(SlideUnreadable, match="no DICOM file"):
        read_header(tmp_path / "text")
    for length in (140, 200, 260, 400):
        (tmp_path / "cut.dcm").write_bytes(sound[:length])
        with pytest.raises(SlideUnreadable, match=r"cut\.dcm is damaged: its DICOM header"):
            read_header(tmp_path / "cut.dcm")
    deep = encoded([(0x00020010, "UI", b"1.2.840.10008.1.2.1")])
    deep += (
        struct.pack("<HH", 8, 0x1115) + b"SQ\0\0" + struct.pack("<IHHI", UNDEFINED, 0xFFFE, 0xE000, UNDEFINED)
    ) * 5000
    (tmp_path / "deep.dcm").write_bytes(bytes(128) + b"DICM" + deep)
    with pytest.raises(SlideUnreadable, match="without end"):
        read_header(tmp_path / "deep.dcm")


def test_damaged_headers_end_in_an_error_of_ours(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = tmp_path / "hurt.dcm"
    refused = 0
    for number in range(2000):
        data = bytearray(dicom("1.2.840.10008.1.2" + ("", ".1", ".2")[number % 3], defined=number % 2 == 0))
        for _ in range(chance.choice((1, 3, 10))):
            data[chance.randrange(128, len(data))] = chance.choice((0, 1, 0x7F, 0xFF, chance.randrange(256)))
        path.write_bytes(data)
        try:
            read_header(path)
        except SlideUnreadable:
            refused += 1
    assert 200 < refused < 2000
