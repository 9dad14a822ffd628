"""Files of known formats that no reader here reads, told by their first bytes: each is named, with what helps, rather
than called damaged.

Some of them would open: a VSI is a TIFF and a MRXS a JPEG, of a small preview; the slide lies in a folder beside it.

Sources: the formats' own descriptions of their signatures; Bio-Formats' CellSensReader (VSI, ETS); OpenSlide's page on
MIRAX.
"""

from __future__ import annotations

from pathlib import Path

from backend.errors import DicomUnsupported, FormatUnsupported, SlideUnreadable
from backend.slides.dicom_header import DicomHeader, read_header

_HEAD_BYTES = 4096
_BY_QUPATH = "Convert it to OME-TIFF with QuPath or with bioformats2raw and raw2ometiff."
_BY_VENDOR = "Export it as TIFF or DICOM with the scanner maker's program, or convert it to OME-TIFF with QuPath."
_PLAIN = "Save it as PNG, JPEG or TIFF."
_NOT_A_SLIDE = "Give the slide itself."

# (where, signature, name, what helps)
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x70\0\0\0", "a Leica LIF", _BY_QUPATH),
    (0, b"\xda\xce\xbe\x0a", "a Nikon ND2", _BY_QUPATH),
    (0, b"SIS\0", "an Olympus ETS, a part of a VSI slide", _BY_QUPATH),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an OLE file (such as Zeiss ZVI or Olympus OIB)", _BY_QUPATH),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (such as Imaris)", _BY_QUPATH),
    (0, b"SQLite format 3\0", "an SQLite database of an unknown kind", _BY_VENDOR),
    (0, b"%PDF-", "a PDF", "Export its picture as an image."),
    (
        0,
        b"PK\x03\x04",
        "a ZIP archive (or what is stored as one: iSyntax2, zipped Zarr)",
        "Unpack it and give the slide inside.",
    ),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "Unpack it and give the slide inside."),
    (0, b"Rar!\x1a\x07", "a RAR archive", "Unpack it and give the slide inside."),
    (0, b"\x1f\x8b\x08", "a gzip archive", "Unpack it and give the slide inside."),
    (257, b"ustar", "a tar archive", "Unpack it and give the slide inside."),
    (0, b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image (or an old Nikon ND2)", _PLAIN),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 stream", _PLAIN),
    (0, b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", _PLAIN),
    (0, b"\xff\x0a", "a JPEG XL stream", _PLAIN),
    (0, b"II\xbc\x01", "a JPEG XR image", _PLAIN),
    (8, b"WEBPVP8", "a WebP image", _PLAIN),
    (4, b"ftypavif", "an AVIF image", _PLAIN),
    (4, b"ftyphei", "a HEIC image", _PLAIN),
    (4, b"ftyp", "a video", _NOT_A_SLIDE),
    (0, b"GIF8", "a GIF", _PLAIN),
    (0, b"BM", "a BMP", _PLAIN),
    (0, b"8BPS", "a Photoshop document", _PLAIN),
    (0, b"NRRD0", "an NRRD volume", _NOT_A_SLIDE),
    (344, b"n+1\0", "a NIfTI volume", _NOT_A_SLIDE),
)
_TEXTS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"[NanoZoomer Digital Pathology Image Set]",
        "a Hamamatsu NDPIS, a list of NDPI files of one channel each",
        "Give one of its NDPI files; images of channels are not supported.",
    ),
    (
        b"<ImageList",
        "an Aperio AFI, a list of slides of one fluorescence channel each",
        "Fluorescence is not supported.",
    ),
    (
        b'ObjectType="DPUfsImport"',
        "a Philips iSyntax",
        "Export it as TIFF with Philips' program, or convert it with `isyntax2raw`.",
    ),
)


def check_format(path: Path) -> None:
    """Return unless a file is one of those that would open as a small preview of the slide.

    Raises
    ------
    FormatUnsupported
        An Olympus VSI.
    SlideUnreadable
        A MIRAX index without its folder.
    """
    ending = path.suffix.lower()
    if ending == ".vsi" or _has_ets(path):
        raise FormatUnsupported(
            f"{path.name} is an Olympus VSI, which is not supported: the file itself holds a preview, the slide lies "
            f"in the folder _{path.stem}_.",
            hint=_BY_QUPATH,
        )
    if ending == ".mrxs" and not (path.with_suffix("") / "Slidedat.ini").is_file():
        raise SlideUnreadable(
            f"{path.name} is the index of a MIRAX slide, whose folder {path.stem} with Slidedat.ini is not beside it.",
            hint="Copy the folder of that name together with the .mrxs.",
        )


def check_not_foreign(path: Path) -> None:
    """Raise :class:`~backend.errors.FormatUnsupported` if a file that no reader knows is of a format that has a name."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    for where, signature, name, help_ in _SIGNATURES:
        if head.startswith(signature, where) and not (name == "a BMP" and head[6:10] != b"\0\0\0\0"):
            raise FormatUnsupported(f"{path.name} is {name}, which is not supported.", hint=help_)
    for text, name, help_ in _TEXTS:
        if text in head:
            raise FormatUnsupported(f"{path.name} is {name}, which is not supported.", hint=help_)
    if path.suffix.lower() == ".i2syntax":
        raise FormatUnsupported(f"{path.name} is a Philips iSyntax2, which is not supported.", hint=_BY_VENDOR)


def check_dicom(path: Path) -> DicomHeader:
    """The header of a DICOM file that OpenSlide refuses, if it is of a slide with a pyramid all the same (so that
    something else is wrong with it).

    Raises
    ------
    DicomUnsupported
        It is another kind of object, a slide's label or overview without its pyramid, or stored in a way that is not
        read; the message says what it is.
    SlideUnreadable
        Its header is damaged.
    """
    header = read_header(path)
    modality = f", modality {header.modality}" if header.modality else ""
    if not header.is_whole_slide:
        raise DicomUnsupported(
            f"{path.name} is a DICOM object of another kind than a whole slide: "
            f"{header.sop_class_name or 'no SOP class'}{modality}.",
            hint="Give a file of the slide's own series (VL Whole Slide Microscopy Image, modality SM).",
        )
    kind = header.image_type[2] if len(header.image_type) > 2 else ""
    if kind and kind != "VOLUME":
        raise DicomUnsupported(
            f"{path.name} is the {kind.lower()} picture of a DICOM slide ({'/'.join(header.image_type)}, "
            f"{header.total_columns or header.columns} x {header.total_rows or header.rows} pixels), and its pyramid "
            "is not in this folder.",
            hint="Put the files of the whole series into one folder: those whose image type says VOLUME are the slide.",
        )
    if header.samples_per_pixel == 1 and header.photometric.startswith("MONOCHROME"):
        raise DicomUnsupported(
            f"{path.name} is a DICOM slide in grey ({header.photometric}, {header.bits_allocated} bit), probably "
            "a fluorescence channel, which is not supported.",
            hint="The model knows brightfield images in colour.",
        )
    return header


def _has_ets(path: Path) -> bool:
    """Whether the folder that cellSens keeps a slide's pixels in lies beside a file."""
    try:
        return next((path.parent / f"_{path.stem}_").glob("stack*/*.ets"), None) is not None
    except OSError:
        return False
