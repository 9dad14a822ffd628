"""What is sound and not supported is named for what it is, and read where that is exact; what is damaged stays damaged."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import field_slides as slides
import numpy as np
import pytest
import tifffile
from field_slides import Maker, Picture
from PIL import Image

from backend.errors import (
    ChannelsUnsupported,
    CodecUnsupported,
    DicomUnsupported,
    FormatUnsupported,
    SlideError,
    SlideUnreadable,
)
from backend.results.bag import Bag
from backend.settings import Settings
from backend.slides.images import load_image
from backend.slides.reader import open_slide
from backend.slides.tiling import make_bag

Case = Callable[[Maker], Path]
CODECS: dict[str, Any] = {
    "webp": {"level": 80, "lossless": False},
    "jpegxl": {"level": 95},
    "jpegxr": {"level": 0.9},
    "jpeg2000": {"level": 0},
    "lzma": None,
    "png": None,
    "lerc": None,
    "zstd": None,
}
LOSSLESS = ("jpeg2000", "lzma", "png", "lerc", "zstd")


def bag_of(path: Path, settings: Settings) -> Bag:
    with open_slide(path, settings) as slide:
        return make_bag(slide, settings, task_mpp=None)


def refused(path: Path, settings: Settings, kind: type[SlideError], *words: str) -> str:
    """The message and hint of ``kind``, which hold ``words`` and do not speak of damage."""
    with pytest.raises(kind) as error:
        open_slide(path, settings)
    assert type(error.value) is kind
    said = str(error.value)
    for word in words:
        assert word in said, said
    assert "damaged" not in said.replace("not damaged", "") and "again" not in said, said
    return said


@pytest.fixture(scope="module")
def pyramids(picture: Picture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The picture as a pyramid, once for each codec; and ``deflate``, which OpenSlide reads."""
    folder = tmp_path_factory.mktemp("codecs")
    levels = slides.levels(picture[800:2000, 500:1700], 1, 2, 4)
    return {
        codec: slides.write_tiff(folder / f"{codec}.tif", levels, compression=codec, compressionargs=arguments)
        for codec, arguments in {**CODECS, "deflate": None}.items()
    }


@pytest.mark.parametrize("codec", CODECS)
def test_a_pyramid_of_another_codec_has_the_pixels_and_the_bag_of_its_twin(
    pyramids: dict[str, Path], codec: str, anywhere: Settings
) -> None:
    path = pyramids[codec]
    with open_slide(path, anywhere) as slide:
        assert slide.level_downsamples == (1, 2, 4)
        assert slide.mpp == pytest.approx(0.499, rel=1e-4)
        for level in range(3):
            decoded = tifffile.imread(path, key=level)  # imagecodecs' own decoding of every tile
            factor = 2**level
            height, width = decoded.shape[:2]
            for x, y in ((0, 0), (40, 60), (width - 224, height - 224)):
                found = slide.read_region(x * factor, y * factor, 224 * factor, 224)
                assert np.array_equal(found, decoded[y : y + 224, x : x + 224]), (level, x, y)
        edge = slide.read_region(width_of(path) - 100, -50, 224, 224)
        assert (edge[:, 100:] == 255).all() and (edge[:50] == 255).all()
    found, twin = bag_of(path, anywhere), bag_of(pyramids["deflate"], anywhere)
    assert found.grid_size == twin.grid_size
    assert np.array_equal(found.coords, twin.coords) or codec not in LOSSLESS
    assert abs(len(found) - len(twin)) <= 1


def width_of(path: Path) -> int:
    with tifffile.TiffFile(path) as tiff:
        return int(tiff.pages[0].imagewidth)


def test_the_codec_of_an_svs_is_not_its_damage(pyramids: dict[str, Path], tmp_path: Path, anywhere: Settings) -> None:
    """OpenSlide takes it for Aperio's by its text, and refuses the WebP in it (openslide#416)."""
    picture = tifffile.imread(pyramids["deflate"], key=0)
    text = "Aperio Image Library v12.0.0\r\n1200x1200 (256x256) webp|AppMag = 20|MPP = 0.4990"
    path = slides.write_tiff(
        tmp_path / "webp.svs",
        slides.levels(picture, 1, 4),
        text=text,
        mpp=None,
        compression="webp",
        compressionargs={"level": 80},
    )
    bag = bag_of(path, anywhere)
    assert bag.mpp == pytest.approx(0.499) and len(bag) > 10


def test_a_codec_that_nothing_decodes_is_named(pyramids: dict[str, Path], tmp_path: Path, anywhere: Settings) -> None:
    for number, name in ((34661, "JBIG"), (50014, "TIFF compression 50014")):
        path = tmp_path / f"{number}.tif"
        shutil.copy(pyramids["webp"], path)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for page in tiff.pages:
                page.tags["Compression"].overwrite(number)
        refused(path, anywhere, CodecUnsupported, f"{number}.tif", name, "vips")
        single = slides.write_tiff(
            tmp_path / "single.tif",
            [np.zeros((300, 300, 3), np.uint8)],
            compression="webp",
            compressionargs={"level": 80},
        )
        with tifffile.TiffFile(single, mode="r+") as tiff:
            tiff.pages[0].tags["Compression"].overwrite(number)
        refused(single, anywhere, CodecUnsupported, name)


def kinds(picture: Picture) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Pixels of every kind that pictures come in, each with tifffile's arguments."""
    part = picture[800:1400, 600:1300]
    grey = part[..., :1].copy()
    alpha = np.tile(np.arange(700, dtype=np.uint8) // 3, (600, 1))[..., None]
    palette = np.zeros((3, 256), np.uint16)
    palette[0], palette[1], palette[2] = (np.arange(256) * 257, np.arange(256)[::-1] * 257, 30_000)
    return {
        "grey": (grey[..., 0], {"photometric": "minisblack"}),
        "inverted": (255 - grey[..., 0], {"photometric": "miniswhite"}),
        "deep": (part.astype(np.uint16) * 257, {"photometric": "rgb"}),
        "planar": (np.moveaxis(part, -1, 0).copy(), {"photometric": "rgb", "planarconfig": "separate"}),
        "alpha": (np.concatenate([part, alpha], axis=2), {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "palette": (grey[..., 0], {"photometric": "palette", "colormap": palette}),
    }


@pytest.mark.parametrize("name", ["grey", "inverted", "deep", "planar", "alpha", "palette"])
def test_pixels_of_every_kind_look_as_in_a_plain_image(
    picture: Picture, tmp_path: Path, anywhere: Settings, name: str
) -> None:
    """A pyramid in LZMA, which OpenSlide does not decode, beside the same samples as one image that Pillow or tifffile
    shows.
    """
    samples, arguments = kinds(picture)[name]
    path, plain = tmp_path / "pyramid.tif", tmp_path / "plain.tif"
    axes = (1, 2) if name == "planar" else (0, 1)
    with tifffile.TiffWriter(path) as tiff:
        for number, step in enumerate((1, 2)):
            level = samples[tuple(slice(None, None, step) if a in axes else slice(None) for a in range(samples.ndim))]
            tiff.write(level, subfiletype=number, tile=(128, 128), compression="lzma", metadata=None, **arguments)
    tifffile.imwrite(plain, samples, metadata=None, **arguments)
    shown = np.asarray(load_image(plain, anywhere).rgb)
    with open_slide(path, anywhere) as slide:
        assert slide.level_downsamples == (1, 2)
        assert np.array_equal(slide.read_region(100, 200, 224, 224), shown[200:424, 100:324])


def test_what_is_missing_is_white_and_what_is_cut_off_is_damaged(
    pyramids: dict[str, Path], tmp_path: Path, anywhere: Settings
) -> None:
    for codec in ("webp", "jpegxr"):
        path = tmp_path / f"{codec}.tif"
        shutil.copy(pyramids[codec], path)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag = tiff.pages[0].tags["TileByteCounts"]
            counts = list(tag.value)
            counts[0] = 0
            tag.overwrite(counts)
            tiff.pages[0].tags["TileOffsets"].overwrite(
                [path.stat().st_size - 10 if n == 1 else offset for n, offset in enumerate(tiff.pages[0].dataoffsets)]
            )
        with open_slide(path, anywhere) as slide:
            assert (slide.read_region(0, 0, 224, 224) == 255).all()
            with pytest.raises(SlideUnreadable, match=r"is damaged at x 256, y 0 \(level 0\).*Copy the slide again"):
                slide.read_region(256, 0, 224, 224)
            slide.read_region(600, 600, 224, 224)
    cut = tmp_path / "cut.tif"
    cut.write_bytes(pyramids["webp"].read_bytes()[:100_000])
    with pytest.raises(SlideUnreadable, match="cut short"):
        open_slide(cut, anywhere)


def test_a_tile_that_is_larger_than_it_says_is_not_decoded(tmp_path: Path, anywhere: Settings) -> None:
    """A WebP of 16000 x 16000 pixels is a few kilobytes of white, and would be 768 MB."""
    import imagecodecs

    bomb = imagecodecs.webp_encode(np.full((8000, 8000, 3), 255, np.uint8), level=1, method=0)
    path = slides.write_tiff(
        tmp_path / "bomb.tif",
        slides.levels(np.full((512, 512, 3), 9, np.uint8), 1, 2),
        compression="webp",
        compressionargs={"level": 80},
    )
    with tifffile.TiffFile(path, mode="r+") as tiff:
        end = path.stat().st_size
        tiff.pages[0].tags["TileOffsets"].overwrite([end] * 4)
        tiff.pages[0].tags["TileByteCounts"].overwrite([len(bomb)] * 4)
    path.write_bytes(path.read_bytes() + bomb)
    with pytest.raises(SlideUnreadable, match="8000, 8000"):
        open_slide(path, anywhere)


# --- channels ---------------------------------------------------------------------------------------------------------


def test_fluorescence_is_refused_by_the_names_of_its_channels(case: Case, anywhere: Settings) -> None:
    refused(case(slides.fluorescence), anywhere, ChannelsUnsupported, "3 channels", "DAPI, CD8, PD-1", "uint16")


GREY = np.full((600, 600), 40, np.uint16)


def write_one_fluorescence_channel(path: Path) -> None:
    channel = {"Name": ["DAPI"], "EmissionWavelength": [461.0]}
    tifffile.imwrite(path, GREY[None], ome=True, tile=(256, 256), metadata={"axes": "CYX", "Channel": channel})


def write_two_samples(path: Path) -> None:
    samples = np.stack([GREY, GREY], axis=-1)
    tifffile.imwrite(path, samples, photometric="minisblack", planarconfig="contig", tile=(256, 256), metadata=None)


def write_five_samples(path: Path) -> None:
    samples = np.stack([GREY] * 5, axis=-1)
    tifffile.imwrite(
        path, samples, photometric="rgb", extrasamples=[0, 0], planarconfig="contig", tile=(256, 256), metadata=None
    )


def write_imagej(path: Path) -> None:
    tifffile.imwrite(path, np.stack([GREY] * 4), imagej=True, metadata={"axes": "CYX"})


def write_qptiff(path: Path) -> None:
    with tifffile.TiffWriter(path) as tiff:
        for name in ("DAPI", "Opal 520"):
            kind = f"<ImageType>FullResolution</ImageType><Name>{name}</Name>"
            text = f"<PerkinElmer-QPI-ImageDescription>{kind}</PerkinElmer-QPI-ImageDescription>"
            tiff.write(GREY, tile=(256, 256), description=text, metadata=None)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (write_one_fluorescence_channel, ("1 channel (DAPI)", "fluorescence")),
        (write_two_samples, ("2 channels",)),
        (write_five_samples, ("5 channels",)),
        (write_imagej, ("4 channels",)),
        (write_qptiff, ("2 channels", "DAPI, Opal 520")),
    ],
)
def test_channels_are_no_colours(
    tmp_path: Path, anywhere: Settings, write: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    write(tmp_path / "channels.tif")
    refused(tmp_path / "channels.tif", anywhere, ChannelsUnsupported, *words, "not supported")


def test_brightfield_whose_colours_are_channels_is_read(picture: Picture, tmp_path: Path, anywhere: Settings) -> None:
    """raw2ometiff without --rgb writes red, green and blue as an image each, with levels in SubIFDs of their own."""
    path = tmp_path / "planes.ome.tif"
    names = {"Name": ["Red", "Green", "Blue"]}
    scale = {"PhysicalSizeX": 0.499, "PhysicalSizeY": 0.499}
    with tifffile.TiffWriter(path, ome=True) as tiff:
        kind = {"photometric": "minisblack", "tile": (256, 256), "compression": "zlib"}
        planes = [np.moveaxis(level, -1, 0) for level in slides.levels(picture, 1, 4)]
        tiff.write(planes[0], subifds=1, metadata={"axes": "CYX", "Channel": names} | scale, **kind)
        tiff.write(planes[1], subfiletype=1, **kind)
    with open_slide(path, anywhere) as slide:
        assert slide.level_downsamples == (1, 4)
        assert np.array_equal(slide.read_region(500, 600, 224, 224), picture[600:824, 500:724])
        assert len(make_bag(slide, anywhere, task_mpp=None)) > 10


def test_of_focal_planes_and_further_pictures_the_first_is_used_and_that_is_said(
    picture: Picture, tmp_path: Path, anywhere: Settings
) -> None:
    part = picture[800:1400, 600:1300]
    stack = np.stack([part, part[::-1], part])
    tifffile.imwrite(
        tmp_path / "z.ome.tif", stack, ome=True, photometric="rgb", tile=(256, 256), metadata={"axes": "ZYXS"}
    )
    tifffile.imwrite(tmp_path / "pages.tif", stack, photometric="rgb", tile=(256, 256), metadata=None)
    for name, words in (("z.ome.tif", "3 focal planes"), ("pages.tif", "3 pictures")):
        with open_slide(tmp_path / name, anywhere) as slide:
            assert np.array_equal(slide.read_region(0, 0, 224, 224), part[:224, :224])
            assert any(words in note and "first is used" in note for note in slide.notes)


# --- DICOM ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dicom(test_data: Path) -> Path:
    return test_data / "slides" / "cmu1-dicom"


@pytest.mark.parametrize(("number", "kind"), [("04", "label"), ("07", "overview"), ("08", "thumbnail")])
def test_dicom_without_its_pyramid_says_what_it_is(
    dicom: Path, tmp_path: Path, anywhere: Settings, number: str, kind: str
) -> None:
    shutil.copy(dicom / f"{number}.dcm", tmp_path)
    refused(tmp_path / f"{number}.dcm", anywhere, DicomUnsupported, f"the {kind} picture", "ORIGINAL/PRIMARY", "VOLUME")


def test_dicom_of_another_kind_says_what_it_is(dicom: Path, tmp_path: Path, anywhere: Settings) -> None:
    folder = slides.dicom_with_annotation(dicom, tmp_path)
    refused(folder / "ANN_nuclei.dcm", anywhere, DicomUnsupported, "Microscopy Bulk Simple Annotations", "modality ANN")
    for sop_class, name in (
        (b"1.2.840.10008.5.1.4.1.1.2", "CT Image"),
        (b"1.2.840.10008.5.1.4.1.1.66.4", "Segmentation"),
    ):
        (tmp_path / "other.dcm").write_bytes(dicom_object(sop_class))
        refused(tmp_path / "other.dcm", anywhere, DicomUnsupported, name, "modality OT")


def dicom_object(sop_class: bytes) -> bytes:
    """A DICOM file of a class, without pixels; as long as one, so that readers look into it."""
    meta = slides.element(b"\2\0\2\0", b"UI", sop_class) + slides.element(b"\2\0\x10\0", b"UI", b"1.2.840.10008.1.2.1")
    body = slides.element(slides.CLASS, b"UI", sop_class) + slides.element(b"\x08\0\x60\0", b"CS", b"OT")
    body += slides.element(slides.STUDY, b"UI", b"2.25.1") + slides.element(slides.SERIES, b"UI", b"2.25.2")
    return bytes(128) + b"DICM" + slides.element(b"\2\0\0\0", b"UL", struct.pack("<I", len(meta))) + meta + body


@pytest.mark.parametrize(
    ("syntax", "name"), [("80", "JPEG-LS Lossless"), ("57", "JPEG Lossless"), ("70", "JPEG Lossless SV1")]
)
def test_a_dicom_slide_of_another_codec_names_it(
    dicom: Path, tmp_path: Path, anywhere: Settings, syntax: str, name: str
) -> None:
    for path in dicom.glob("*.dcm"):
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(
            data.replace(b"1.2.840.10008.1.2.4.50", f"1.2.840.10008.1.2.4.{syntax}".encode())
        )
    refused(tmp_path / "03.dcm", anywhere, CodecUnsupported, name, f"1.2.840.10008.1.2.4.{syntax}")


def test_dicom_that_is_cut_short_stays_damaged(dicom: Path, tmp_path: Path, anywhere: Settings) -> None:
    (tmp_path / "cut.dcm").write_bytes((dicom / "03.dcm").read_bytes()[:300])
    with pytest.raises(SlideUnreadable, match="damaged"):
        open_slide(tmp_path / "cut.dcm", anywhere)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_the_preview_of_a_vsi_is_not_the_slide(case: Case, tmp_path: Path, anywhere: Settings) -> None:
    preview = case(slides.plain)
    shutil.copy(preview, tmp_path / "slide.vsi")
    refused(tmp_path / "slide.vsi", anywhere, FormatUnsupported, "Olympus VSI", "_slide_", "QuPath")
    shutil.copy(preview, tmp_path / "renamed.tif")
    refused_after = tmp_path / "_renamed_" / "stack1"
    refused_after.mkdir(parents=True)
    (refused_after / "frame_t.ets").write_bytes(b"SIS\0")
    refused(tmp_path / "renamed.tif", anywhere, FormatUnsupported, "Olympus VSI")


def test_the_preview_of_a_mirax_slide_is_not_the_slide(picture: Picture, tmp_path: Path, anywhere: Settings) -> None:
    Image.fromarray(picture[:600, :600]).save(tmp_path / "slide.mrxs", "JPEG")
    with pytest.raises(SlideUnreadable, match=r"slide\.mrxs is the index of a MIRAX slide.*folder"):
        open_slide(tmp_path / "slide.mrxs", anywhere)


@pytest.mark.parametrize(
    ("name", "head", "words"),
    [
        ("a.lif", b"\x70\0\0\0\x10\0\0\0\x2a", ("Leica LIF", "QuPath")),
        ("a.nd2", b"\xda\xce\xbe\x0a\x10\0\0\0\x20\0\0\0ND2 FILE SIGNATURE CHUNK NAME01!", ("Nikon ND2",)),
        (
            "a.ndpis",
            b"[NanoZoomer Digital Pathology Image Set]\r\nNoImages=2\r\nImage0=a-DAPI.ndpi",
            ("Hamamatsu NDPIS", "NDPI files"),
        ),
        ("a.afi", b"<ImageList>\r\n<Image><Path>a_DAPI.svs</Path></Image></ImageList>", ("Aperio AFI",)),
        (
            "a.isyntax",
            b'<DataObject ObjectType="DPUfsImport">\n<Attribute Name="DICOM_',
            ("Philips iSyntax", "isyntax2raw"),
        ),
        ("a.pdf", b"%PDF-1.7\n", ("PDF",)),
        ("a.zip", b"PK\x03\x04\x14\0", ("ZIP", "Unpack")),
        ("a.svs.gz", b"\x1f\x8b\x08\0", ("gzip", "Unpack")),
        ("a.jp2", b"\0\0\0\x0cjP  \r\n\x87\n\0\0\0\x14ftypjp2 ", ("JPEG 2000",)),
        ("a.webp", b"RIFF\x10\0\0\0WEBPVP8 ", ("WebP image",)),
        ("a.ims", b"\x89HDF\r\n\x1a\n", ("HDF5",)),
    ],
)
def test_files_of_known_formats_are_named(
    tmp_path: Path, anywhere: Settings, name: str, head: bytes, words: tuple[str, ...]
) -> None:
    (tmp_path / name).write_bytes(head + bytes(500))
    refused(tmp_path / name, anywhere, FormatUnsupported, name, "not supported", *words)
