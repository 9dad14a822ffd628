"""Small slides and images, and damage done to them by a seeded generator: the same number is the same mutant, always."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image
from slides.slide_makers import stroma, write

_APERIO = "Aperio Image Library v12.0\r\n640x480 [0,0 640x480] (128x128) JPEG/RGB Q=80|AppMag = 20|MPP = 0.5"
_LEICA = (
    '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection sizeX="800000" sizeY="600000"><image>'
    '<creationDate>2020-01-01T00:00:00Z</creationDate><device model="test" version="1"/><pixels sizeX="640" sizeY="480">'
    '<dimension sizeX="640" sizeY="480" r="0" ifd="0"/><dimension sizeX="160" sizeY="120" r="1" ifd="1"/></pixels>'
    '<view sizeX="320000" sizeY="240000" offsetX="1000" offsetY="1000"/><scanSettings><objectiveSettings><objective>20</objective>'
    "</objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture><illuminationSource>brightfield"
    "</illuminationSource></illuminationSettings></scanSettings></image></collection></scn>"
)
_PHILIPS = (
    '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport"><Attribute Name="DICOM_MANUFACTURER">x</Attribute>'
    '<Attribute Name="PIM_DP_SCANNED_IMAGES"><Array><DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>'
    '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>'
    '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">"0.0005" "0.0005"</Attribute>'
    '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER">0</Attribute></DataObject>'
    '<DataObject ObjectType="PixelDataRepresentation"><Attribute Name="DICOM_PIXEL_SPACING">"0.002" "0.002"</Attribute>'
    '<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_NUMBER">1</Attribute></DataObject>'
    "</Array></Attribute></DataObject></Array></Attribute></DataObject>"
)
_DIMENSION_TAGS = (
    256,
    257,
    258,
    277,
    278,
    322,
    323,
)  # width, height, bits, samples, rows per strip, tile width and height
_HOSTILE_INTEGERS = (0, 1, 2, 7, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 100_000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def write_seeds(folder: Path) -> list[Path]:
    """The sound files from which all mutants are made: each a few kilobytes, each read by another way."""
    picture = stroma(640, 480, seed=1)
    levels = [picture, np.asarray(Image.fromarray(picture).reduce(4))]

    def tiff(
        name: str,
        description: str | None = None,
        *,
        compression: str = "jpeg",
        bigtiff: bool = False,
        byteorder: str = "<",
        software: str = "",
    ) -> Path:
        with tifffile.TiffWriter(folder / name, bigtiff=bigtiff, byteorder=byteorder) as writer:
            for number, level in enumerate(levels):
                writer.write(
                    level,
                    photometric="rgb",
                    tile=(128, 128),
                    compression=compression,
                    subfiletype=int(number > 0),
                    description=description if number == 0 else None,
                    resolution=(20_000 / 4**number,) * 2,
                    resolutionunit="CENTIMETER",
                    software=software or None,
                    metadata=None,
                )
        return folder / name

    made = [
        tiff("aperio.svs", _APERIO),
        tiff("leica.scn", _LEICA),
        tiff("philips.tiff", _PHILIPS, software="Philips DP v1.0"),
        tiff("big.tif", bigtiff=True),
        tiff("motorola.tif", byteorder=">"),
        tiff("lzw.tif", compression="lzw"),
        tiff("webp.tif", compression="webp"),
        tiff("jpegxl.tif", compression="jpegxl"),
        tiff("jpegxr.tif", compression="jpegxr"),
        tiff("lzma.tif", compression="lzma"),
        write(folder / "pyramid.tif", stroma(600, 520, seed=2)),
    ]
    with tifffile.TiffWriter(folder / "subifd.ome.tif", ome=True) as writer:
        scale = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        writer.write(picture, subifds=1, photometric="rgb", tile=(128, 128), compression="jpeg", metadata=scale)
        writer.write(levels[1], subfiletype=1, photometric="rgb", tile=(128, 128), compression="jpeg")
    made.append(folder / "subifd.ome.tif")
    small = Image.fromarray(picture[:300, :320])
    tifffile.imwrite(
        folder / "planar16.tif",
        np.moveaxis(np.asarray(small), -1, 0).astype(np.uint16) * 257,
        photometric="rgb",
        planarconfig="separate",
        compression="zlib",
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    small.save(folder / "turned.jpg", exif=exif, dpi=(50_800, 50_800))
    small.save(folder / "progressive.jpg", progressive=True, quality=60)
    small.convert("CMYK").save(folder / "cmyk.jpg")
    small.quantize(32).save(folder / "palette.png", transparency=0)
    small.convert("RGBA").save(folder / "alpha.png")
    small.save(folder / "lzw-pillow.tif", compression="tiff_lzw")
    small.convert("1").save(folder / "fax.tif", compression="group4")
    return [
        *made,
        *(
            folder / n
            for n in (
                "planar16.tif",
                "turned.jpg",
                "progressive.jpg",
                "cmyk.jpg",
                "palette.png",
                "alpha.png",
                "lzw-pillow.tif",
                "fax.tif",
            )
        ),
    ]


@dataclass(frozen=True)
class Mutant:
    """A damaged file: where it comes from, what was done to it, its bytes."""

    seed: str
    damage: str
    data: bytes


class Mutator:
    """Makes mutants by number from the files that :func:`write_seeds` wrote."""

    def __init__(self, seeds: list[Path]) -> None:
        self._seeds = [(path.name, path.read_bytes()) for path in seeds]

    def mutant(self, number: int) -> Mutant:
        """Mutant ``number``: seeds in turn, one to three damages each."""
        chance = random.Random(f"mutant {number}")  # reproducible on purpose
        name, sound = self._seeds[number % len(self._seeds)]
        data, done = bytearray(sound), []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            damages = [*_ANY, *_OF[_kind(sound)] * 3]
            damage = chance.choice(damages)
            other = chance.choice(self._seeds)[1]
            try:
                damage(data, chance) if damage is not _splice else _splice(data, chance, other)
            except (struct.error, LookupError, ValueError, StopIteration, OverflowError):
                _flip_bits(data, chance)  # an earlier damage left nothing of the structure
            done.append(damage.__name__.strip("_"))
        return Mutant(name, "+".join(done), bytes(data))


# --- damage to any file -------------------------------------------------------------------------------------------


def _flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 8, 64))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _flip_header(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 2, 4))):
        data[chance.randrange(min(len(data), 512))] = chance.randrange(256)


def _overwrite_integer(data: bytearray, chance: random.Random) -> None:
    size = chance.choice((1, 2, 4))
    at = chance.randrange(len(data) - size)
    data[at : at + size] = (chance.choice(_HOSTILE_INTEGERS) & (256**size - 1)).to_bytes(
        size, chance.choice(("little", "big"))
    )  # type: ignore[arg-type]


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randrange(1, len(data)) :]


def _zero_run(data: bytearray, chance: random.Random) -> None:
    at, length = chance.randrange(len(data)), chance.choice((16, 256, 4096))
    end = min(at + length, len(data))
    data[at:end] = bytes(end - at)


def _delete_run(data: bytearray, chance: random.Random) -> None:
    at = chance.randrange(len(data) // 2)
    del data[at : at + chance.choice((1, 3, 64, 1000))]


def _repeat_run(data: bytearray, chance: random.Random) -> None:
    at, length = chance.randrange(len(data)), chance.choice((1, 8, 200))
    data[at:at] = data[at : at + length] * chance.choice((1, 3))


def _splice(data: bytearray, chance: random.Random, other: bytes = b"") -> None:
    at = chance.randrange(len(data))
    data[at:] = other[chance.randrange(len(other)) :]


# --- damage to a TIFF's directories -------------------------------------------------------------------------------


def tiff_entries(data: bytearray) -> tuple[str, bool, list[tuple[int, int]], list[int]]:
    """Byte order, BigTIFF or not, (position of each entry, its tag), and the positions of the links to the next directory."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    link = 8 if big else 4
    found: list[tuple[int, int]] = []
    links = [link]
    at = struct.unpack_from(order + ("Q" if big else "I"), data, link)[0]
    while at and at < len(data) and len(links) < 8:
        count = struct.unpack_from(order + ("Q" if big else "H"), data, at)[0]
        first, step = at + (8 if big else 2), 20 if big else 12
        for i in range(min(count, 64)):
            found.append((first + i * step, struct.unpack_from(order + "H", data, first + i * step)[0]))
        links.append(first + count * step)
        at = struct.unpack_from(order + ("Q" if big else "I"), data, links[-1])[0]
    return order, big, found, links


def _tiff_value(data: bytearray, chance: random.Random) -> None:
    order, big, found, _ = tiff_entries(data)
    at, _ = chance.choice(found)
    struct.pack_into(order + "I", data, at + (12 if big else 8), chance.choice(_HOSTILE_INTEGERS))


def _tiff_dimension(data: bytearray, chance: random.Random) -> None:
    order, big, found, _ = tiff_entries(data)
    at = chance.choice([position for position, tag in found if tag in _DIMENSION_TAGS])
    struct.pack_into(
        order + "HH", data, at, struct.unpack_from(order + "H", data, at)[0], 4
    )  # a LONG holds any of them
    struct.pack_into(
        order + "I",
        data,
        at + (12 if big else 8),
        chance.choice((0, 1, 16, 65_535, 100_000, 1 << 20, 0x7FFFFFFF, 0xFFFFFFF0)),
    )


def _tiff_huge(data: bytearray, chance: random.Random) -> None:
    """Both sides at once: 100 000 x 100 000 pixels in a few kilobytes."""
    order, big, found, _ = tiff_entries(data)
    edge = chance.choice((50_000, 100_000, 1_000_000))
    for position, tag in found:
        if tag in (256, 257):
            struct.pack_into(order + "HH", data, position, tag, 4)
            struct.pack_into(order + "I", data, position + (12 if big else 8), edge)
            if tag == 257:
                return  # the first directory only


def _tiff_type(data: bytearray, chance: random.Random) -> None:
    order, _, found, _ = tiff_entries(data)
    struct.pack_into(order + "H", data, chance.choice(found)[0] + 2, chance.choice((0, *_TYPE_BYTES, 99)))


def _tiff_count(data: bytearray, chance: random.Random) -> None:
    order, _, found, _ = tiff_entries(data)
    struct.pack_into(order + "I", data, chance.choice(found)[0] + 4, chance.choice(_HOSTILE_INTEGERS))


def _tiff_tag(data: bytearray, chance: random.Random) -> None:
    order, _, found, _ = tiff_entries(data)
    tags = [tag for _, tag in found] + [259, 262, 284, 317, 330, 338, 347, 530, 34_665, 34_675, 65_535]
    struct.pack_into(order + "H", data, chance.choice(found)[0], chance.choice(tags))


def _tiff_compression(data: bytearray, chance: random.Random) -> None:
    order, big, found, _ = tiff_entries(data)
    at = chance.choice([position for position, tag in found if tag in (259, 262, 317, 284)])
    struct.pack_into(
        order + "H",
        data,
        at + (12 if big else 8),
        chance.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 32773, 33003, 33005, 34712, 34887, 34925, 50000)),
    )


def _tiff_link(data: bytearray, chance: random.Random) -> None:
    """A directory that comes next and is an earlier one, itself, or nowhere."""
    order, big, _, links = tiff_entries(data)
    target = chance.choice(
        [struct.unpack_from(order + ("Q" if big else "I"), data, links[0])[0], 4, len(data) - 1, 0xFFFFFFF0]
    )
    struct.pack_into(order + ("Q" if big else "I"), data, chance.choice(links[1:] or links), target)


def _tiff_array(data: bytearray, chance: random.Random) -> None:
    """Offsets or lengths of tiles and strips that lie elsewhere, overlap, or are huge."""
    order, big, found, _ = tiff_entries(data)
    at = chance.choice([position for position, tag in found if tag in (273, 279, 324, 325)])
    kind, count = struct.unpack_from(order + ("HQ" if big else "HI"), data, at + 2)
    width = _TYPE_BYTES.get(kind, 4)
    start = at + (12 if big else 8)
    if width * count > (8 if big else 4):
        start = struct.unpack_from(order + ("Q" if big else "I"), data, start)[0]
    for _ in range(chance.choice((1, 1, 4))):
        value = chance.choice((*_HOSTILE_INTEGERS, len(data), len(data) - 10)) & (256**width - 1)
        place = start + width * chance.randrange(max(1, min(count, 64)))
        data[place : place + width] = value.to_bytes(width, "little" if order == "<" else "big")


def _tiff_text(data: bytearray, chance: random.Random) -> None:
    """The description, by which a vendor's format is recognised and parsed."""
    at = chance.choice(
        [i for i in (data.find(b"MPP"), data.find(b"<"), data.find(b"sizeX"), data.find(b"Aperio")) if i >= 0]
    )
    text = chance.choice(
        (b"MPP = nan|", b"MPP = 1e308", b"<!ENTITY", b"\xff\xfe\x00", b'sizeX="-1', b"|=|=|", b"%n%n%s%s", b"<a><a><a>")
    )
    data[at : at + len(text)] = text


# --- damage to JPEG and PNG ---------------------------------------------------------------------------------------


def _jpeg_segments(data: bytearray) -> list[tuple[int, int]]:
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        found.append((at, data[at + 1]))
        if data[at + 1] == 0xDA:
            break
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return found


def _jpeg_size(data: bytearray, chance: random.Random) -> None:
    at = next(at for at, marker in _jpeg_segments(data) if 0xC0 <= marker <= 0xC2)
    struct.pack_into(">HH", data, at + 5, chance.choice((0, 1, 4000, 65_500)), chance.choice((0, 1, 4000, 65_500)))


def _jpeg_segment(data: bytearray, chance: random.Random) -> None:
    at, _ = chance.choice(_jpeg_segments(data))
    if chance.random() < 0.5:
        struct.pack_into(">H", data, at + 2, chance.choice((0, 1, 2, 0x7FFF, 0xFFFF)))
    else:
        data[at + 1] = chance.choice((0xC0, 0xC2, 0xC4, 0xC9, 0xCA, 0xD9, 0xDA, 0xDB, 0xDD, 0xE1, 0xEE))


def _jpeg_table(data: bytearray, chance: random.Random) -> None:
    at, _ = chance.choice([segment for segment in _jpeg_segments(data) if segment[1] in (0xC0, 0xC2, 0xC4, 0xDA, 0xDB)])
    data[at + 4 + chance.randrange(20)] = chance.randrange(256)


def _chunks(data: bytearray) -> list[tuple[int, int, bytes]]:
    found, at = [], 8
    while at + 12 <= len(data):
        length = struct.unpack_from(">I", data, at)[0]
        found.append((at, length, bytes(data[at + 4 : at + 8])))
        at += 12 + length
    return found


def _png_header(data: bytearray, chance: random.Random) -> None:
    """Size, depth, colour type or interlacing, with a checksum that is right: decoders look no further than that."""
    at = 16
    if chance.random() < 0.5:
        struct.pack_into(
            ">II", data, at, *chance.choice(((100_000, 100_000), (0, 5), (1, 0x7FFFFFFF), (30_000, 10), (3000, 3000)))
        )
    else:
        data[at + 8 + chance.randrange(5)] = chance.choice((0, 1, 2, 3, 4, 6, 7, 16, 255))
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))


def _png_chunk(data: bytearray, chance: random.Random) -> None:
    at, length, _ = chance.choice(_chunks(data))
    what = chance.randrange(3)
    if what == 0:
        struct.pack_into(">I", data, at, chance.choice((0, length + 1, 0x7FFFFFFF, 0xFFFFFFFF)))
    elif what == 1:
        data[at + 4 : at + 8] = chance.choice((b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"eXIf", b"IEND", b"acTL"))
        struct.pack_into(">I", data, at + 8 + length, zlib.crc32(data[at + 4 : at + 8 + length]))
    else:
        data[at:at] = data[at : at + 12 + length]


def _png_bomb(data: bytearray, chance: random.Random) -> None:
    """Text and pixels that inflate to far more than they say."""
    at = next(at for at, _, kind in _chunks(data) if kind == b"IDAT")
    kind = chance.choice((b"IDAT", b"iCCP", b"zTXt"))
    body = zlib.compress(bytes(30_000_000), 9)
    if kind != b"IDAT":
        body = b"x\0\0" + body
    data[at:at] = struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


Damage = Callable[..., None]
_ANY: list[Damage] = [_flip_bits, _flip_header, _overwrite_integer, _cut, _zero_run, _delete_run, _repeat_run, _splice]
_OF: dict[str, list[Damage]] = {
    "tiff": [
        _tiff_value,
        _tiff_dimension,
        _tiff_huge,
        _tiff_type,
        _tiff_count,
        _tiff_tag,
        _tiff_compression,
        _tiff_link,
        _tiff_array,
        _tiff_text,
    ],
    "jpeg": [_jpeg_size, _jpeg_segment, _jpeg_table],
    "png": [_png_header, _png_chunk, _png_bomb],
}


def _kind(data: bytes) -> str:
    return "jpeg" if data[:2] == b"\xff\xd8" else "png" if data[:4] == b"\x89PNG" else "tiff"


def bombs() -> dict[str, bytes]:
    """Files that say 100 000 x 100 000 pixels in their headers, and hold next to nothing."""
    edge = 100_000
    empty = zlib.compress(bytes(1_000_000))
    header = struct.pack(">IIBBBBB", edge, edge, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    def tiff(*, tiled: bool, compression: int, description: bytes = b"") -> bytes:
        tags = [
            (256, 4, 1, edge),
            (257, 4, 1, edge),
            (258, 3, 1, 8),
            (259, 3, 1, compression),
            (262, 3, 1, 2),
            (277, 3, 1, 3),
        ]
        tags += (
            [(322, 4, 1, 256), (323, 4, 1, 256), (324, 4, 1, 8), (325, 4, 1, 100)]
            if tiled
            else [(273, 4, 1, 8), (278, 4, 1, edge), (279, 4, 1, 100)]
        )
        if description:
            tags.append((270, 2, len(description), 8 + 2 + 12 * (len(tags) + 1) + 4))
        tags.sort()
        directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
        return b"II*\0" + struct.pack("<I", 8) + directory + description + bytes(200)

    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64)).save(jpeg, "JPEG")
    large = bytearray(jpeg.getvalue())
    at = next(at for at, marker in _jpeg_segments(large) if marker == 0xC0)
    struct.pack_into(">HH", large, at + 5, 65_500, 65_500)
    return {
        "bomb.png": b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", empty) + chunk(b"IEND", b""),
        "bomb.jpg": bytes(large),
        "strip.tif": tiff(tiled=False, compression=1),
        "strip-deflate.tif": tiff(tiled=False, compression=8),
        "tiled.tif": tiff(tiled=True, compression=7),
        "tiled-deflate.tif": tiff(tiled=True, compression=8),
        "aperio.svs": tiff(tiled=True, compression=7, description=_APERIO.encode() + b"\0"),
        "aperio-j2k.svs": tiff(tiled=True, compression=33003, description=_APERIO.encode() + b"\0"),
    }
