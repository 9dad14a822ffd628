"""What a DICOM file is, from its first elements: the kind of object, the series, and how its pixels are stored. No pixels are read.

Only the elements that are asked for are read; others are stepped over, so that a file of gigabytes takes a few kilobytes of reading.

Sources: DICOM PS3.5 (chapter 7: elements, sequences; annex A: transfer syntaxes), PS3.10 (7.1: the head of a file), PS3.6 (the tables of names).
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from backend.errors import SlideUnreadable

WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"

_STORAGE = "1.2.840.10008.5.1.4.1.1."
_SOP_CLASS_NAMES = {
    "1.2.840.10008.1.3.10": "Media Storage Directory",
    **{
        _STORAGE + number: name
        for number, name in {
            "1": "Computed Radiography Image",
            "1.1": "Digital X-Ray Image",
            "1.2": "Digital Mammography X-Ray Image",
            "2": "CT Image",
            "2.1": "Enhanced CT Image",
            "3.1": "Ultrasound Multi-frame Image",
            "4": "MR Image",
            "4.1": "Enhanced MR Image",
            "6.1": "Ultrasound Image",
            "7": "Secondary Capture Image",
            "7.1": "Multi-frame Single Bit Secondary Capture Image",
            "7.2": "Multi-frame Grayscale Byte Secondary Capture Image",
            "7.3": "Multi-frame Grayscale Word Secondary Capture Image",
            "7.4": "Multi-frame True Color Secondary Capture Image",
            "11.1": "Grayscale Softcopy Presentation State",
            "11.2": "Color Softcopy Presentation State",
            "11.8": "Advanced Blending Presentation State",
            "20": "Nuclear Medicine Image",
            "30": "Parametric Map",
            "66": "Raw Data",
            "66.4": "Segmentation",
            "66.5": "Surface Segmentation",
            "66.7": "Label Map Segmentation",
            "77.1.1": "VL Endoscopic Image",
            "77.1.2": "VL Microscopic Image",
            "77.1.3": "VL Slide-Coordinates Microscopic Image",
            "77.1.4": "VL Photographic Image",
            "77.1.6": "VL Whole Slide Microscopy Image",
            "77.1.7": "Dermoscopic Photography Image",
            "77.1.8": "Confocal Microscopy Image",
            "77.1.9": "Confocal Microscopy Tiled Pyramidal Image",
            "88.11": "Basic Text SR",
            "88.22": "Enhanced SR",
            "88.33": "Comprehensive SR",
            "88.34": "Comprehensive 3D SR",
            "88.59": "Key Object Selection",
            "91.1": "Microscopy Bulk Simple Annotations",
            "104.1": "Encapsulated PDF",
            "104.2": "Encapsulated CDA",
            "128": "Positron Emission Tomography Image",
            "481.2": "RT Dose",
            "481.3": "RT Structure Set",
        }.items()
    },
}

_TRANSFER_SYNTAX_NAMES = {
    "1.2.840.10008.1.2" + number: name
    for number, name in {
        "": "Implicit VR Little Endian",
        ".1": "Explicit VR Little Endian",
        ".1.98": "Encapsulated Uncompressed",
        ".1.99": "Deflated Explicit VR Little Endian",
        ".2": "Explicit VR Big Endian",
        ".4.50": "JPEG Baseline",
        ".4.51": "JPEG Extended (12 bit)",
        ".4.57": "JPEG Lossless",
        ".4.70": "JPEG Lossless SV1",
        ".4.80": "JPEG-LS Lossless",
        ".4.81": "JPEG-LS Near-lossless",
        ".4.90": "JPEG 2000 Lossless",
        ".4.91": "JPEG 2000",
        ".4.92": "JPEG 2000 Part 2 Lossless",
        ".4.93": "JPEG 2000 Part 2",
        ".4.100": "MPEG-2",
        ".4.102": "MPEG-4 H.264",
        ".4.107": "HEVC H.265",
        ".4.110": "JPEG XL Lossless",
        ".4.111": "JPEG XL JPEG Recompression",
        ".4.112": "JPEG XL",
        ".4.201": "High-Throughput JPEG 2000 Lossless",
        ".4.202": "High-Throughput JPEG 2000 Lossless (RPCL)",
        ".4.203": "High-Throughput JPEG 2000",
        ".5": "RLE Lossless",
    }.items()
}

_IMPLICIT, _DEFLATED, _BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"
_LONG_VRS = frozenset(b"OB OD OF OL OV OW SQ SV UC UN UR UT UV".split())
_UNDEFINED = 0xFFFFFFFF
_ITEM, _END_OF_ITEM, _END_OF_SEQUENCE = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
_SHARED_GROUPS, _PIXEL_MEASURES, _PIXEL_SPACING = 0x52009229, 0x00289110, 0x00280030
_NAMES = {
    0x00020002: "media_sop_class",
    0x00020010: "transfer_syntax",
    0x00080008: "image_type",
    0x00080016: "sop_class",
    0x00080018: "instance_uid",
    0x00080060: "modality",
    0x00100020: "patient_id",
    0x0020000D: "study_uid",
    0x0020000E: "series_uid",
    0x00200052: "frame_of_reference_uid",
    0x00280002: "samples_per_pixel",
    0x00280004: "photometric",
    0x00280008: "frames",
    0x00280010: "rows",
    0x00280011: "columns",
    _PIXEL_SPACING: "pixel_spacing",
    0x00280100: "bits_allocated",
    0x00480001: "imaged_width",
    0x00480002: "imaged_height",
    0x00480006: "total_columns",
    0x00480007: "total_rows",
}
_LAST = _SHARED_GROUPS  # elements are stored in the order of their tags: nothing that is wanted comes later
_BINARY = {"samples_per_pixel": "H", "rows": "H", "columns": "H", "bits_allocated": "H"}
_BINARY |= {"imaged_width": "f", "imaged_height": "f", "total_columns": "I", "total_rows": "I"}
_MAX_ELEMENTS = 100_000  # of headers as they are written, some hundreds
_MAX_DEPTH = 16
_MAX_VALUE_BYTES = 2**16
_MAX_INFLATED_BYTES = 2**24


@dataclass(frozen=True)
class DicomHeader:
    """The header of one DICOM file. What it does not state is ``""``, ``()`` or 0.

    Attributes
    ----------
    sop_class, sop_class_name
        The kind of object: its UID, and in words (``"VL Whole Slide Microscopy Image"``; the UID itself where it is not a known one).
    study_uid, series_uid, instance_uid, frame_of_reference_uid
        The files of one slide share study and series; its levels each have instances of their own.
    patient_id, modality
        As stated; the modality of a slide is ``SM``.
    image_type
        Its values: ``("ORIGINAL", "PRIMARY", "VOLUME", "NONE")``; the third says ``VOLUME``, ``LABEL``, ``OVERVIEW`` or ``THUMBNAIL``.
    transfer_syntax, transfer_syntax_name
        How pixels are stored: UID, and in words (the UID itself where it is not a known one).
    rows, columns, total_rows, total_columns
        Pixels of a frame, and of the whole image where the frames are its tiles.
    frames, samples_per_pixel, bits_allocated, photometric
        As stated.
    pixel_spacing_um
        (x, y) in µm per pixel, as stated by the pixel spacing that all frames share, or by that of the image.
    imaged_um
        (width, height) in µm of what is imaged (Imaged Volume Width and Height).
    """

    sop_class: str = ""
    study_uid: str = ""
    series_uid: str = ""
    instance_uid: str = ""
    frame_of_reference_uid: str = ""
    patient_id: str = ""
    modality: str = ""
    image_type: tuple[str, ...] = ()
    transfer_syntax: str = ""
    rows: int = 0
    columns: int = 0
    total_rows: int = 0
    total_columns: int = 0
    frames: int = 1
    samples_per_pixel: int = 0
    bits_allocated: int = 0
    photometric: str = ""
    pixel_spacing_um: tuple[float, float] | None = None
    imaged_um: tuple[float, float] | None = None

    @property
    def sop_class_name(self) -> str:
        return _SOP_CLASS_NAMES.get(self.sop_class, self.sop_class)

    @property
    def transfer_syntax_name(self) -> str:
        return _TRANSFER_SYNTAX_NAMES.get(self.transfer_syntax, self.transfer_syntax)

    @property
    def is_whole_slide(self) -> bool:
        """Whether it is an image of a slide (a level, or its label or overview)."""
        return self.sop_class == WHOLE_SLIDE


def read_header(path: Path) -> DicomHeader:
    """The header of a DICOM file.

    Raises
    ------
    SlideUnreadable
        It is no DICOM file, or its header breaks off or cannot be.
    """
    with path.open("rb") as file:
        if file.read(132)[128:] != b"DICM":
            raise SlideUnreadable(f"{path.name} is no DICOM file: DICM does not stand at byte 128.")
        try:
            values = _Elements(file, "<", explicit=True).until(0x00030000)
            syntax = _text(values.get("transfer_syntax", b""))
            data: BinaryIO = file
            if syntax == _DEFLATED:
                data = BytesIO(zlib.decompressobj(-zlib.MAX_WBITS).decompress(file.read(), _MAX_INFLATED_BYTES))
            order = ">" if syntax == _BIG_ENDIAN else "<"
            values |= _Elements(data, order, explicit=syntax != _IMPLICIT).until(_LAST + 1)
            return _header(values, order)
        except (EOFError, ValueError, struct.error, zlib.error) as error:
            raise SlideUnreadable(
                f"{path.name} is damaged: its DICOM header {error}.", hint="Copy it again: it was probably cut short."
            ) from error


def _header(values: dict[str, bytes], order: str) -> DicomHeader:
    def text(name: str) -> str:
        return _text(values.get(name, b""))

    def number(name: str) -> float:
        code = _BINARY[name]
        size = struct.calcsize(code)
        value = values.get(name, b"")
        return struct.unpack(order + code, value[:size])[0] if len(value) >= size else 0

    frames = text("frames")
    spacing = text("pixel_spacing").split("\\")
    # Between rows, then between columns (PS3.3, 10.7.1.3), in mm.
    spacing_um = (float(spacing[1]) * 1000, float(spacing[0]) * 1000) if len(spacing) == 2 else None
    imaged = (number("imaged_width") * 1000, number("imaged_height") * 1000)
    image_type = text("image_type")
    return DicomHeader(
        sop_class=text("sop_class") or text("media_sop_class"),
        study_uid=text("study_uid"),
        series_uid=text("series_uid"),
        instance_uid=text("instance_uid"),
        frame_of_reference_uid=text("frame_of_reference_uid"),
        patient_id=text("patient_id"),
        modality=text("modality"),
        image_type=tuple(part.strip() for part in image_type.split("\\")) if image_type else (),
        transfer_syntax=text("transfer_syntax"),
        rows=int(number("rows")),
        columns=int(number("columns")),
        total_rows=int(number("total_rows")),
        total_columns=int(number("total_columns")),
        frames=int(frames) if frames else 1,
        samples_per_pixel=int(number("samples_per_pixel")),
        bits_allocated=int(number("bits_allocated")),
        photometric=text("photometric"),
        pixel_spacing_um=spacing_um,
        imaged_um=imaged if all(imaged) else None,
    )


def _text(value: bytes) -> str:
    try:
        return value.decode().strip(" \0")
    except UnicodeDecodeError:
        return value.decode("latin-1").strip(" \0")


class _Elements:
    """Data elements from where a file stands. ``EOFError`` and ``ValueError`` complete the sentence "the header …"."""

    def __init__(self, file: BinaryIO, order: str, *, explicit: bool) -> None:
        self._file = file
        self._order = order
        self._explicit = explicit
        self._count = 0
        at = file.tell()
        self._end = file.seek(0, 2)
        file.seek(at)

    def until(self, tag: int) -> dict[str, bytes]:
        """The wanted elements before ``tag``, where the file stands then, by their names here; those inside the shared groups of frames with them."""
        values: dict[str, bytes] = {}
        for found, vr, length in self._at(self._end, tag):
            if found == _SHARED_GROUPS:
                values |= self._spacing(length, 0)
            elif length == _UNDEFINED:
                self._pass_over(0)
            elif found in _NAMES and vr != b"SQ" and length <= _MAX_VALUE_BYTES:
                values[_NAMES[found]] = self._read(length)
            else:
                self._skip(length)
        return values

    def _spacing(self, length: int, depth: int) -> dict[str, bytes]:
        """The pixel spacing inside the items of a sequence."""
        values: dict[str, bytes] = {}
        for found, _, size in self._inside(length, depth):
            if found in (_ITEM, _PIXEL_MEASURES):
                values |= self._spacing(size, depth + 1)
            elif size == _UNDEFINED:
                self._pass_over(depth + 1)
            elif found == _PIXEL_SPACING and size <= _MAX_VALUE_BYTES:
                values[_NAMES[found]] = self._read(size)
            else:
                self._skip(size)
        return values

    def _pass_over(self, depth: int) -> None:
        for _, _, length in self._inside(_UNDEFINED, depth):
            if length == _UNDEFINED:
                self._pass_over(depth + 1)
            else:
                self._skip(length)

    def _inside(self, length: int, depth: int) -> Iterator[tuple[int, bytes, int]]:
        if depth > _MAX_DEPTH:
            raise ValueError("has sequences inside sequences without end")
        end = self._end if length == _UNDEFINED else self._file.tell() + length
        for found, vr, size in self._at(end):
            if found in (_END_OF_ITEM, _END_OF_SEQUENCE):
                return
            yield found, vr, size

    def _at(self, end: int, tag: int = 1 << 32) -> Iterator[tuple[int, bytes, int]]:
        """Tag, VR and length of each element up to byte ``end`` or to ``tag``; whoever takes one reads or skips its value."""
        while self._file.tell() < end:
            group, element = struct.unpack(self._order + "HH", self._read(4))
            found = group << 16 | element
            if found >= tag and group != 0xFFFE:
                self._file.seek(-4, 1)
                return
            self._count += 1
            if self._count > _MAX_ELEMENTS:
                raise ValueError(f"has more than {_MAX_ELEMENTS} elements")
            vr = b""
            if not self._explicit or group == 0xFFFE:
                (length,) = struct.unpack(self._order + "I", self._read(4))
            else:
                vr = self._read(2)
                if not (vr.isalpha() and vr.isupper()):
                    raise ValueError(f"has no kind of value, but {vr!r}, at byte {self._file.tell() - 2}")
                short = struct.unpack(self._order + "H", self._read(2))[0]
                length = struct.unpack(self._order + "I", self._read(4))[0] if vr in _LONG_VRS else short
            yield found, vr, length

    def _read(self, length: int) -> bytes:
        data = self._file.read(length)
        if len(data) < length:
            raise EOFError(f"breaks off at byte {self._file.tell()}")
        return data

    def _skip(self, length: int) -> None:
        if self._file.seek(length, 1) > self._end:
            raise EOFError(f"should go on at byte {self._file.tell()}, and the file has {self._end}")
