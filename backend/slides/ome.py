"""OME-XML, as it stands in the first directory of an OME-TIFF: the scale, the channels, planes and times of its first
image.

Only elements and attributes that are needed are looked at, one after the other, so that memory does not grow with the
text. A text with a document type is refused before it is parsed: entities are declared there and nowhere else, and
OME-XML has none.

Source: the OME schema 2016-06 (Pixels, Channel, TiffData; units of length), https://docs.openmicroscopy.org/ome-model/
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

from backend.slides.mpp import Scale

_MAX_CHARACTERS = 2**24
_MAX_CHANNELS = 1000
_PRIMARY = ("r", "g", "b", "red", "green", "blue")
_PRIMARY_COLOURS = ["-16776961", "16711935", "65535"]  # opaque red, green, blue

# µm in one of each. "pixel" and "reference frame" are units of the schema too, and say nothing of µm.
UM_PER_UNIT = {
    "pm": 1e-6,
    "å": 1e-4,
    "nm": 1e-3,
    "µm": 1.0,
    "mm": 1e3,
    "cm": 1e4,
    "m": 1e6,
    "in": 25_400.0,
    "pt": 25_400 / 72,
}
UM_PER_UNIT |= dict.fromkeys(("um", "micron", "microns", "micrometer", "micrometers", "micrometre"), 1.0)
UM_PER_UNIT |= {"nanometer": 1e-3, "millimeter": 1e3, "centimeter": 1e4, "inch": 25_400.0, "ångström": 1e-4}
# The Greek letter and the micro sign look alike; a micro sign in Latin-1, decoded as UTF-8, is the replacement
# character; ImageJ escapes it.
_MICRO = str.maketrans({"μ": "µ", "\ufffd": "µ"})


@dataclass
class OmeImage:
    """The first image (or the one that :func:`read_ome` was asked for) of an OME-XML.

    Attributes
    ----------
    size
        (width, height) in pixels, as stated.
    channels
        The name of each, ``""`` where it has none.
    samples
        Samples of each channel: 3 for one of RGB.
    colours
        The colour of each as it stands (RGBA in a signed 32-bit number), ``""`` where it has none.
    planes, times
        Number of focal planes and of points in time.
    fluorescence
        Whether a channel says that it is (an emission wavelength, a fluorophore, epifluorescence).
    physical
        The attributes of its scale as they stand: PhysicalSizeX, PhysicalSizeXUnit, …
    elsewhere
        The name of the file that has the metadata, where this one has none.
    """

    size: tuple[int, int] = (0, 0)
    channels: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    colours: list[str] = field(default_factory=list)
    size_c: int = 1
    planes: int = 1
    times: int = 1
    fluorescence: bool = False
    physical: dict[str, str] = field(default_factory=dict)
    elsewhere: str = ""

    @property
    def channel_count(self) -> int:
        """Channels of one sample each: 3 for an RGB image, however it is stored."""
        return sum(self.samples) or self.size_c

    @property
    def is_rgb_in_planes(self) -> bool:
        """Whether its three channels say that they are red, green and blue, each stored as an image of its own."""
        if self.fluorescence or self.samples != [1, 1, 1] or (self.planes, self.times) != (1, 1):
            return False
        return [n.lower()[:1] for n in self.channels if n.lower() in _PRIMARY] == [
            "r",
            "g",
            "b",
        ] or self.colours == _PRIMARY_COLOURS

    @property
    def scale(self) -> Scale:
        """What it states in µm per pixel; a unit that is no length (``pixel``) states nothing."""
        if self.elsewhere:
            return Scale(unread=f"its OME-XML is in another file, {self.elsewhere!r:.80}")
        values = []
        for axis in "XY":
            text, unit = self.physical.get(f"PhysicalSize{axis}"), self.physical.get(f"PhysicalSize{axis}Unit", "µm")
            if text is None:
                return Scale()
            factor = um_per_unit(unit)
            if factor is None:
                unread = (
                    ""
                    if unit.lower() in ("pixel", "reference frame")
                    else f"PhysicalSize{axis} in {unit!r:.30} in the OME-XML"
                )
                return Scale(unread=unread)
            value = number(text)
            if value is None:
                return Scale(unread=f"PhysicalSize{axis} = {text!r:.30} in the OME-XML")
            values.append(value * factor)
        return Scale((values[0], values[1]))


def is_ome(description: str) -> bool:
    """Whether an image description is OME-XML."""
    return description.rstrip(" \r\n\0").endswith("OME>") and description.lstrip("\ufeff \r\n")[:1] == "<"


def read_ome(description: str, size: tuple[int, int] | None = None) -> OmeImage:
    """The first image of an OME-XML, or the first one of ``size`` (width, height in pixels) where there is one.

    Raises
    ------
    ValueError
        It is no well-formed XML, has a document type, or is larger than 16 million characters.
    """
    if len(description) > _MAX_CHARACTERS:
        raise ValueError(f"the OME-XML has {len(description)} characters")
    images: list[OmeImage] = []
    elsewhere: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(":")[2]
        if name == "Pixels":
            image = OmeImage(size=(_whole(attributes, "SizeX"), _whole(attributes, "SizeY")))
            image.size_c, image.planes, image.times = (max(1, _whole(attributes, f"Size{axis}")) for axis in "CZT")
            image.physical = {k: v for k, v in attributes.items() if k.startswith("PhysicalSize")}
            images.append(image)
        elif name == "Channel" and images and len(images[-1].channels) < _MAX_CHANNELS:
            images[-1].channels.append(attributes.get("Name", ""))
            images[-1].colours.append(attributes.get("Color", ""))
            images[-1].samples.append(max(1, _whole(attributes, "SamplesPerPixel", 1)))
            lit = " ".join(attributes.get(k, "") for k in ("IlluminationType", "ContrastMethod")).lower()
            images[-1].fluorescence |= (
                "fluorescence" in lit or "EmissionWavelength" in attributes or "Fluor" in attributes
            )
        elif name == "BinaryOnly":
            elsewhere.append(attributes.get("MetadataFile", ""))

    def refuse(*_: object) -> None:
        raise ValueError("the OME-XML has a document type")

    parser = expat.ParserCreate("utf-8")
    parser.StartElementHandler = start
    parser.StartDoctypeDeclHandler = refuse
    try:
        parser.Parse(description.strip("\ufeff \r\n\0").encode(errors="replace"), True)
    except expat.ExpatError as error:
        raise ValueError(f"the OME-XML is not well formed: {error}") from error
    if elsewhere and not images:
        return OmeImage(elsewhere=elsewhere[0])
    if not images:
        raise ValueError("the OME-XML describes no image")
    return next((image for image in images if image.size == size), images[0])


def um_per_unit(unit: str) -> float | None:
    """µm in a unit of length, by its symbol or name in English; ``None`` for what is none."""
    unit = unit.strip(' "').replace("\\u00B5", "µ").translate(_MICRO).lower()
    # str.lower leaves the micro sign as it is.
    return UM_PER_UNIT.get(unit)


def number(text: str) -> float | None:
    """A number, also with a comma for its point, as programs write it in some languages."""
    text = text.strip(' "\t')
    if text.count(",") == 1 and "." not in text:
        text = text.replace(",", ".")
    try:
        return float(text)
    except ValueError:
        return None


def _whole(attributes: dict[str, str], name: str, default: int = 0) -> int:
    text = attributes.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else default
