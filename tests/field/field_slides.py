"""Slides as they occur in the field, made small out of one picture of H&E at 0.499 µm/px. Each maker's docstring says what is right for it.

Numbers of tiles are compared with those of the plain picture (``plain``): makers of the same tissue must give the same bag.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from scipy import ndimage

MPP, GLASS = 0.499, 243  # of the picture: µm per pixel, and its glass in all three channels
JPEG = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}}

# Optical densities (red, green, blue) of stains, of length 1: Ruifrok & Johnston 2001; those of Giemsa are in Fiji's colour deconvolution.
HAEMATOXYLIN, EOSIN, DAB = (
    np.array(v, np.float32) for v in ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
)
GIEMSA_BLUE, GIEMSA_RED = (np.array(v, np.float32) for v in ((0.835, 0.514, 0.196), (0.093, 0.954, 0.283)))

Picture = np.ndarray  # uint8 (h, w, 3), RGB


def levels(rgb: Picture, *factors: int) -> list[Picture]:
    """The picture reduced by each factor."""
    return [np.asarray(Image.fromarray(rgb).reduce(factor)) for factor in factors]


def write_tiff(
    path: Path, images: Sequence[Picture], mpp: float | None = MPP, text: str | None = None, **kind: object
) -> Path:
    """One directory an image, all but the first marked as reduced. The first has the scale (in pixels per cm) and the description."""
    scale = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {}
    with tifffile.TiffWriter(path) as tiff:
        for number, image in enumerate(images):
            first = {} if number else scale | {"description": text}
            tiff.write(image, subfiletype=min(number, 1), metadata=None, **(JPEG | kind | first))
    return path


def stain_amounts(rgb: Picture) -> tuple[np.ndarray, np.ndarray]:
    """Haematoxylin and eosin in each pixel, float32 (h, w) each, by colour deconvolution (Ruifrok & Johnston 2001)."""
    density = -np.log10(np.maximum(rgb, 1).astype(np.float32) / GLASS)
    vectors = np.stack([HAEMATOXYLIN, EOSIN, np.cross(HAEMATOXYLIN, EOSIN)])
    amounts = np.maximum(density @ np.linalg.inv(vectors), 0)
    return amounts[..., 0], amounts[..., 1]


def stained(*amounts: tuple[np.ndarray, np.ndarray]) -> Picture:
    """What is seen of (stain, amount (h, w)) on glass, by the law of Beer and Lambert."""
    density = sum(amount[..., None] * stain for stain, amount in amounts)
    return np.clip(GLASS * 10**-density, 0, 255).astype(np.uint8)


def plain(rgb: Picture, out: Path) -> Path:
    """The picture as an ordinary pyramid."""
    return write_tiff(out / "plain.tif", levels(rgb, 1, 2, 4))


def cropped_twin(rgb: Picture, out: Path) -> Path:
    """An ordinary pyramid of 8688 x 8704 px: the twin of :func:`padded_levels`."""
    return write_tiff(out / "cropped_twin.tif", _wide(rgb), mpp=0.5, tile=(512, 512))


def padded_levels(rgb: Picture, out: Path) -> Path:
    """Each level filled up with white to whole tiles of 512 px, so that sizes give downsamples of 1.89, 3.4, 5.67, 8.5 (openslide#137, libdicom#79).
    Right: 1, 2, 4, 8, 16, and the twin's bag."""
    filled = [
        np.pad(p, ((0, -p.shape[0] % 512), (0, -p.shape[1] % 512), (0, 0)), constant_values=255) for p in _wide(rgb)
    ]
    return write_tiff(out / "padded_levels.tif", filled, mpp=0.5, tile=(512, 512))


def _wide(rgb: Picture) -> list[Picture]:
    # Multiples of 16, so that all levels have whole pixels.
    rows, columns = -(-8704 // rgb.shape[0]), -(-8688 // rgb.shape[1])
    return levels(np.tile(rgb, (rows, columns, 1))[:8704, :8688], 1, 2, 4, 8, 16)


def macro_level(rgb: Picture, out: Path) -> Path:
    """A macro picture of another shape, tiled and marked as reduced as if it were a level (large_image#943). Right: it is none; downsamples 1, 2."""
    macro = np.full((256, 640, 3), 235, np.uint8)
    macro[:, :200] = (60, 160, 90)
    macro[128:224, 400:480] = np.asarray(Image.fromarray(rgb).resize((80, 96)))
    return write_tiff(out / "macro_level.tif", [*levels(rgb, 1, 2), macro])


def offset(rgb: Picture, out: Path) -> Path:
    """offset.scn: the scanned area begins at 1200, 800 of a larger slide (``openslide.bounds-*``; qupath#820). Right: HDF5 keeps the slide's frame, the
    GeoJSON for QuPath begins at the bounds."""
    nm, pictures = 500, levels(rgb, 1, 4)
    (h, w), (h4, w4) = (picture.shape[:2] for picture in pictures)
    xml = f"""<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
    <collection sizeX="{6000 * nm}" sizeY="{6000 * nm}"><image><pixels sizeX="{w}" sizeY="{h}">
    <dimension r="0" ifd="0" sizeX="{w}" sizeY="{h}"/><dimension r="1" ifd="1" sizeX="{w4}" sizeY="{h4}"/></pixels>
    <view sizeX="{w * nm}" sizeY="{h * nm}" offsetX="{1200 * nm}" offsetY="{800 * nm}"/><scanSettings>
    <objectiveSettings><objective>20</objective></objectiveSettings>
    <illuminationSettings><illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image></collection></scn>"""
    return write_tiff(out / "offset.scn", pictures, mpp=nm / 1000, text=xml)


def _faded(rgb: Picture) -> Picture:
    pale = np.clip(GLASS * (rgb / GLASS) ** (1 / 3), 0, 255).astype(np.uint8)
    return np.concatenate([np.full((1000, pale.shape[1], 3), GLASS, np.uint8), pale])


def faded(rgb: Picture, out: Path) -> Path:
    """H&E at a third of its density, below a thousand rows of glass."""
    return write_tiff(out / "faded.tif", levels(_faded(rgb), 1, 2, 4, 8))


def faded_with_green_pen(rgb: Picture, out: Path) -> Path:
    """As :func:`faded`, with a green pen mark on that glass (CLAM#214, LazySlide#216). Right: the same tiles, none on the pen (y below 1000)."""
    picture = _faded(rgb)
    picture[300:700, 200:2000] = (20, 120, 60)
    return write_tiff(out / "faded_with_green_pen.tif", levels(picture, 1, 2, 4, 8))


def giemsa(rgb: Picture, out: Path) -> Path:
    """A stain as blue as ink (HistoQC#319). Right: all of the tissue."""
    h, e = stain_amounts(rgb)
    return write_tiff(out / "giemsa.tif", levels(stained((GIEMSA_BLUE, h), (GIEMSA_RED, 0.6 * e)), 1, 2, 4, 8))


def ihc(rgb: Picture, out: Path) -> Path:
    """Epithelium brown with DAB; stroma negative, pale blue of haematoxylin alone (CLAM#43). Right: the stroma is found too."""
    h, e = stain_amounts(rgb)
    positive = ndimage.gaussian_filter((ndimage.gaussian_filter(h, 25) > 0.35).astype(np.float32), 6)
    blue = 0.3 * h * positive + 0.27 * (h + e) * (1 - positive)
    picture = stained((DAB, 1.2 * (h + e) * positive), (HAEMATOXYLIN, blue))
    return write_tiff(out / "ihc.tif", levels(picture, 1, 2, 4, 8))


_YELLOWED = np.array((233, 225, 207), np.float32)


def tinted_empty(rgb: Picture, out: Path) -> Path:
    """Glass yellowed by old mounting medium, and nothing on it (qupath#53). Right: no tissue."""
    noise = np.random.default_rng(0).normal(0, 2, rgb.shape)
    return write_tiff(out / "tinted_empty.tif", levels((_YELLOWED + noise).clip(0, 255).astype(np.uint8), 1, 2, 4, 8))


def tinted(rgb: Picture, out: Path) -> Path:
    """The same glass with tissue. Right: the tiles of the plain one."""
    picture = (rgb * (_YELLOWED / GLASS)).clip(0, 255).astype(np.uint8)
    return write_tiff(out / "tinted.tif", levels(picture, 1, 2, 4, 8))


def scale_by_ten(rgb: Picture, out: Path) -> Path:
    """A converter took pixels per mm for pixels per cm: 0.05 µm/px is stated, 0.5 is true (TRIDENT#135, dlup#80, HEST#106). Right: 0.5 can be forced."""
    return write_tiff(out / "scale_by_ten.tif", levels(rgb, 1, 2, 4), mpp=0.05)


def subifd(rgb: Picture, out: Path) -> Path:
    """subifd.ome.tif: levels in SubIFDs, the scale only in the OME-XML (grandqc#14, raw2ometiff#67). Right: 0.499 µm/px, downsamples 1, 2, 4."""
    path = out / "subifd.ome.tif"
    scale = {f"PhysicalSize{axis}": MPP for axis in "XY"} | {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for number, picture in enumerate(levels(rgb, 1, 2, 4)):
            place = {"subfiletype": 1} if number else {"subifds": 2, "metadata": {"axes": "YXS"} | scale}
            tiff.write(picture, **JPEG, **place)
    return path


def aperio_strips(rgb: Picture, out: Path) -> Path:
    """A region exported from an Aperio slide: strips, no resolution, the scale only in the description. Right: 0.497 µm/px."""
    h, w = rgb.shape[:2]
    text = f"Aperio Image Library v12.0.0\r\n{w}x{h} (0x0) RAW;Region|AppMag = 20|MPP = 0.4970|OriginalWidth = {w}|OriginalHeight = {h}"
    strips = {"tile": None, "rowsperstrip": 16, "compression": "zlib", "compressionargs": None, "predictor": True}
    return write_tiff(out / "aperio_strips.tif", [rgb], mpp=None, text=text, **strips)


def webp(rgb: Picture, out: Path) -> Path:
    """A pyramid of WebP tiles (openslide#416). Right: it is read, or the codec is called not supported; never 'damaged'."""
    kind = {"compression": "webp", "compressionargs": {"level": 80, "lossless": False}}
    return write_tiff(out / "webp.tif", levels(rgb, 1, 2, 4), **kind)


def fluorescence(rgb: Picture, out: Path) -> Path:
    """fluorescence.ome.tif: three channels of uint16, bright on black. Right: refused because fluorescence is not supported; not 'no tissue'."""
    path = out / "fluorescence.ome.tif"
    signal = (255 - np.asarray(Image.fromarray(rgb).convert("L"))).astype(np.uint16) * 16
    metadata = {
        "axes": "CYX",
        "PhysicalSizeX": MPP,
        "PhysicalSizeY": MPP,
        "Channel": {"Name": ["DAPI", "CD8", "PD-1"]},
    }
    kind = {"photometric": "minisblack", "tile": (256, 256), "compression": "zlib", "predictor": True}
    kind |= {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, np.stack([signal, signal // 2, signal // 3]), ome=True, metadata=metadata, **kind)
    return path


# --- folders --------------------------------------------------------------------------------------------------------

STUDY, SERIES, FRAME_OF_REFERENCE = b"\x20\0\x0d\0", b"\x20\0\x0e\0", b"\x20\0\x52\0"  # tags, little endian
CLASS, INSTANCE = b"\x08\0\x16\0", b"\x08\0\x18\0"
ANNOTATIONS = b"1.2.840.10008.5.1.4.1.1.91.1"


def uid(dicom: bytes, tag: bytes) -> bytes:
    """The first unique identifier of this tag in a DICOM file (explicit VR, little endian)."""
    at = dicom.index(tag + b"UI")
    return dicom[at + 8 : at + 8 + struct.unpack_from("<H", dicom, at + 6)[0]].rstrip(b"\0")


def element(tag: bytes, vr: bytes, value: bytes) -> bytes:
    """A short data element of DICOM, its value filled up to an even length."""
    value += (b"\0" if vr == b"UI" else b" ") * (len(value) % 2)
    return tag + vr + struct.pack("<H", len(value)) + value


def dicom_two_slides(dicom: Path, out: Path) -> Path:
    """A folder with the files of two slides of one study, told apart only by their series (wsidicom#91). Right: two slides."""
    folder = _fresh(out / "dicom_two_slides")
    for path in sorted(dicom.glob("*.dcm")):
        data = path.read_bytes()
        (folder / f"A_{path.name}").write_bytes(data)
        for known in (uid(data, tag) for tag in (SERIES, FRAME_OF_REFERENCE, INSTANCE)):
            data = data.replace(known, known[:-1] + str((int(known[-1:]) + 1) % 10).encode())
        (folder / f"B_{path.name}").write_bytes(data)
    return folder


def dicom_with_annotation(dicom: Path, out: Path) -> Path:
    """Beside the slide lies an object with annotations of it (modality ANN), whose name comes first (wsidicomizer#106). Right: one slide."""
    folder = _fresh(out / "dicom_with_annotation")
    files = sorted(dicom.glob("*.dcm"))
    for path in files:
        shutil.copy(path, folder / f"SM_{path.name}")
    study, instance = uid(files[0].read_bytes(), STUDY), b"2.25.20250101"
    meta = b"\2\0\1\0OB\0\0\2\0\0\0\0\1" + element(b"\2\0\2\0", b"UI", ANNOTATIONS)
    meta += element(b"\2\0\3\0", b"UI", instance) + element(b"\2\0\x10\0", b"UI", b"1.2.840.10008.1.2.1")
    body = element(CLASS, b"UI", ANNOTATIONS) + element(INSTANCE, b"UI", instance)
    body += element(b"\x08\0\x60\0", b"CS", b"ANN") + element(STUDY, b"UI", study)
    body += element(SERIES, b"UI", b"2.25.20250102") + element(b"\x6a\0\1\0", b"CS", b"2D")
    head = bytes(128) + b"DICM" + element(b"\2\0\0\0", b"UL", struct.pack("<I", len(meta)))
    (folder / "ANN_nuclei.dcm").write_bytes(head + meta + body)
    return folder


def linked(rgb: Picture, out: Path) -> Path:
    """A folder in which one link leads to the slide under another name, and one in a subfolder back to the folder. Right: one slide."""
    folder = _fresh(out / "linked")
    shutil.copy(plain(rgb, folder), folder / "slide.tif")
    (folder / "plain.tif").unlink()
    (folder / "alias.tif").symlink_to("slide.tif")
    (folder / "sub").mkdir()
    (folder / "sub" / "up").symlink_to("..")
    return folder


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


Maker = Callable[[Picture, Path], Path]
