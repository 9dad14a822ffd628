"""Which controls a project has, and what each asks of us. Pure: XML in, frozen data out.

Attributes that a control may carry for us: ``model_skip`` (leave it to the annotator), ``model_top_k`` (how many
regions), ``model_score_threshold`` (lowest score of a region), ``model_prior`` (on a ``Choice``: how frequent it is
among the slides, see :mod:`backend.learning.prevalence`), ``model_heatmap`` (``alpha``, ``bands``, or ``classes``: only
what a tile head says). Controls are read only if they label the image; controls for single regions or pages
(``perRegion``, ``perItem``) belong to the annotator.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast

from backend.errors import LabelConfigUnsupported, TaskFieldMissing

Kind = Literal[
    "BrushLabels",
    "RectangleLabels",
    "PolygonLabels",
    "KeyPointLabels",
    "EllipseLabels",
    "Choices",
    "Number",
    "Rating",
    "TextArea",
]
Heatmap = Literal["alpha", "bands", "classes"]

GEOMETRY_KINDS: tuple[Kind, ...] = ("BrushLabels", "RectangleLabels", "PolygonLabels", "KeyPointLabels")
HEAD_KINDS: tuple[Kind, ...] = ("Choices", "Number", "Rating")
DRAWN_KINDS: tuple[Kind, ...] = ("EllipseLabels",)
"""Controls that people draw with, and that this backend learns from, but does not fill."""
_KINDS: dict[str, Kind] = {kind.lower(): kind for kind in (*GEOMETRY_KINDS, *HEAD_KINDS, *DRAWN_KINDS, "TextArea")}
_TOP_K_KINDS: tuple[Kind, ...] = ("RectangleLabels", "PolygonLabels", "KeyPointLabels")
MAX_TOP_K = 400

EXAMPLE = """<View>
  <Image name="image" value="$image" zoom="true"/>
  <BrushLabels name="attention" toName="image">
    <Label value="Attention" background="#15a34a"/>
  </BrushLabels>
</View>"""
"""The shortest labelling config that gets a heatmap."""


@dataclass(frozen=True)
class ImageObject:
    """The ``<Image>`` of the config that is pre-labelled.

    ``field`` is the task field that holds the image; ``None`` if the value is not just ``$field`` (then the task needs
    a field ``slide``). ``pages``: the image is a ``valueList``, so each region states its page by ``item_index``.
    """

    name: str
    field: str | None
    pages: bool


@dataclass(frozen=True)
class Control:
    """One control that this backend can fill or learn from.

    ``labels`` are in the order of the config; empty for Number, Rating and TextArea. ``multiple``: several choices may
    be made. ``priors``: how frequent choices are, of those that say it.
    """

    kind: Kind
    name: str
    to_name: str
    labels: tuple[str, ...] = ()
    skip: bool = False
    top_k: int | None = None
    score_threshold: float | None = None
    heatmap: Heatmap | None = None
    smart: bool = False
    multiple: bool = False
    priors: tuple[tuple[str, float], ...] = ()

    @property
    def region_type(self) -> str:
        """The ``type`` of this control's regions, which is also the key of the labels in their ``value``."""
        return self.kind.lower()


@dataclass(frozen=True)
class LabelingConfig:
    """The image and the controls that label it, in the order of the config, skipped ones included."""

    image: ImageObject
    controls: tuple[Control, ...]

    def active(self, *kinds: Kind) -> tuple[Control, ...]:
        """Controls of these kinds that are not skipped."""
        return tuple(c for c in self.controls if c.kind in kinds and not c.skip)

    def control(self, name: str) -> Control | None:
        """The control of that name, or ``None``."""
        return next((c for c in self.controls if c.name == name), None)

    def slide_location(self, data: Mapping[str, Any]) -> str | tuple[str, ...]:
        """Where a task's slide lies: its field ``slide`` if it has one, else the field of the image.

        Returns
        -------
        A location, or for a bag of patches the locations of its images in order.

        Raises
        ------
        TaskFieldMissing
            The task lacks the field, or its value is no location.
        """
        field = "slide" if "slide" in data else self.image.field
        if field is None:
            raise TaskFieldMissing(
                "The task has no field 'slide', and the image's value in the labelling config is not a single field.",
                hint="Add a field 'slide' with the slide's location to the task's data.",
            )
        if field not in data:
            has = ", ".join(sorted(map(str, data))) or "no fields at all"
            raise TaskFieldMissing(
                f"The task has no field '{field}' (it has: {has}).",
                hint=f"Import the task with '{field}', or with 'slide' holding the slide's location.",
            )
        value = data[field]
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value and all(isinstance(item, str) and item.strip() for item in value):
            return tuple(value)
        raise TaskFieldMissing(
            f"The task's field '{field}' holds {value!r:.80}, which is no location.",
            hint="It must be a path or URL, or a list of them for a bag of patches.",
        )


def parse_config(xml: str) -> LabelingConfig:
    """Read a labelling config.

    Raises
    ------
    LabelConfigUnsupported
        Not XML, XML with a DOCTYPE (never needed, and the way to entity expansion), no image, no control that this
        backend can fill, a control of ours without labels, or an attribute with a value that cannot be used. The
        message says what to add.
    """
    root = _parse_xml(xml)
    images = {image.name: image for image in map(_image, root.iter()) if image is not None}
    if not images:
        raise LabelConfigUnsupported(
            'The labelling config has no <Image name="…" value="$field"/>.', hint=f"A config that works:\n{EXAMPLE}"
        )
    controls = list(_controls(root, images))
    names = [control.name for control in controls]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise LabelConfigUnsupported(f"The labelling config has two controls named '{doubled}'.")
    ours = [control for control in controls if not control.skip and control.kind not in DRAWN_KINDS]
    if not ours:
        why = (
            'Every control that this backend can fill has model_skip="true".'
            if any(control.kind not in DRAWN_KINDS for control in controls)
            else "The labelling config has no control that this backend can fill: it has no "
            + ", ".join((*GEOMETRY_KINDS, *HEAD_KINDS))
            + " or TextArea for the image."
        )
        raise LabelConfigUnsupported(why, hint=f"A config that works:\n{EXAMPLE}")
    # The image is the one that our regions are drawn on; other images are for looking at.
    first = next((control for control in ours if control.kind in GEOMETRY_KINDS), ours[0])
    image = images[first.to_name]
    return LabelingConfig(image, tuple(control for control in controls if control.to_name == image.name))


def load_template(name: str) -> str:
    """The XML of a shipped labelling config: ``triage``, ``regions``, ``plain``, ``bands`` or ``patches``."""
    folder = resources.files("backend.label_studio") / "templates"
    names = sorted(item.name[:-4] for item in folder.iterdir() if item.name.endswith(".xml"))
    if name not in names:
        raise LabelConfigUnsupported(f"There is no template '{name}'.", hint=f"Shipped: {', '.join(names)}.")
    return (folder / f"{name}.xml").read_text(encoding="utf-8")


# --- reading ----------------------------------------------------------------------------------------------------


def _parse_xml(xml: str) -> ET.Element:
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:
        raise LabelConfigUnsupported(
            "The labelling config has a DOCTYPE or ENTITY, which is refused.", hint="Remove the declaration."
        )
    try:
        return ET.fromstring(xml)
    except (ET.ParseError, ValueError) as error:  # ValueError: lone surrogates and the like
        raise LabelConfigUnsupported(
            f"The labelling config is not XML: {error}.", hint=f"A config that works:\n{EXAMPLE}"
        ) from None


def _attributes(element: ET.Element) -> dict[str, str]:
    """Attributes by lower-case name: the editor ignores the case of names."""
    return {name.lower(): value for name, value in element.attrib.items()}


def _image(element: ET.Element) -> ImageObject | None:
    attributes = _attributes(element)
    name, pages = attributes.get("name"), "valuelist" in attributes
    value = attributes.get("valuelist") or attributes.get("value")
    if element.tag.lower() != "image" or not name or not value:
        return None
    field = re.fullmatch(r"\$([^$, ]+)", value.strip())
    return ImageObject(name, field.group(1) if field else None, pages)


def _controls(root: ET.Element, images: Mapping[str, ImageObject]) -> Iterator[Control]:
    for element in root.iter():
        kind = _KINDS.get(element.tag.lower())
        attributes = _attributes(element)
        name = attributes.get("name")
        to_name = next((part for part in _split(attributes.get("toname")) if part in images), None)
        for_parts = "true" in (attributes.get("perregion", "").lower(), attributes.get("peritem", "").lower())
        if kind is None or not name or to_name is None or for_parts:
            continue
        multiple = kind == "Choices" and attributes.get("choice", "single").startswith("multiple")
        control = Control(
            kind=kind,
            name=name,
            to_name=to_name,
            labels=_labels(element),
            skip=_flag(attributes, name, "model_skip"),
            top_k=_top_k(attributes, name, kind),
            score_threshold=_score_threshold(attributes, name),
            heatmap=_heatmap(attributes, name, kind),
            smart=_flag(attributes, name, "smart"),
            multiple=multiple,
            priors=_priors(element, name, kind, multiple=multiple),
        )
        _check_labels(control)
        yield control


def _split(names: str | None) -> list[str]:
    return [part.strip() for part in (names or "").split(",")]


def _labels(element: ET.Element) -> tuple[str, ...]:
    """What a region states for each ``<Label>`` or ``<Choice>``: its alias if it has one, else its value."""
    children = (_attributes(child) for child in element.iter() if child.tag.lower() in ("label", "choice"))
    return tuple(value for child in children if (value := child.get("alias") or child.get("value")))


def _priors(element: ET.Element, control: str, kind: Kind, *, multiple: bool) -> tuple[tuple[str, float], ...]:
    """How frequent the project says that choices are: each in (0, 1), and of a single choice 1 together."""
    found: list[tuple[str, float]] = []
    children = [_attributes(child) for child in element.iter() if child.tag.lower() in ("label", "choice")]
    for child in children:
        text, name = child.get("model_prior"), child.get("alias") or child.get("value")
        if text is None or not name:
            continue
        if kind != "Choices":
            raise _bad(control, "model_prior", text, "left out: it belongs on a Choice")
        try:
            prior = float(text)
        except ValueError:
            prior = math.nan
        if not 0 < prior < 1:
            raise _bad(control, "model_prior", text, "a number between 0 and 1, such as 0.05 for one slide in twenty")
        found.append((name, prior))
    total = sum(prior for _, prior in found)
    if not multiple and found and (total > 1.01 or (len(found) == len(children) and total < 0.99)):
        raise LabelConfigUnsupported(
            f"The model_prior of the choices of '{control}' sum to {total:.4g}, not to 1.",
            hint="State how frequent each choice is among the slides; those without it share what is left.",
        )
    return tuple(found)


def _check_labels(control: Control) -> None:
    if control.skip or control.kind in ("Number", "Rating", "TextArea", *DRAWN_KINDS):
        return
    if not control.labels:
        child = "Choice" if control.kind == "Choices" else "Label"
        raise LabelConfigUnsupported(
            f"<{control.kind} name='{control.name}'> has no <{child}> with a fixed value.",
            hint=f'Add one, such as <{child} value="Attention"/>, or leave the control to the annotator: model_skip="true".',
        )
    if control.heatmap == "bands" and len(control.labels) < 2:
        raise LabelConfigUnsupported(
            f"<{control.kind} name='{control.name}'> asks for model_heatmap=\"bands\" and has one label.",
            hint='Bands need a label each, lowest attention first: add labels, or use model_heatmap="alpha".',
        )


def _bad(control: str, attribute: str, value: str, wanted: str) -> LabelConfigUnsupported:
    return LabelConfigUnsupported(f"{attribute}={value!r} on the control '{control}' must be {wanted}.")


def _flag(attributes: Mapping[str, str], control: str, attribute: str) -> bool:
    value = attributes.get(attribute, "false")
    if value.lower() not in ("true", "false", "1", "0"):
        raise _bad(control, attribute, value, "true or false")
    return value.lower() in ("true", "1")


def _top_k(attributes: Mapping[str, str], control: str, kind: Kind) -> int | None:
    value = attributes.get("model_top_k")
    if value is None:
        return None
    if kind not in _TOP_K_KINDS:
        raise _bad(control, "model_top_k", value, f"left out: it belongs on {', '.join(_TOP_K_KINDS)}")
    if not re.fullmatch(r"[0-9]{1,9}", value.strip()) or not 1 <= int(value) <= MAX_TOP_K:
        raise _bad(control, "model_top_k", value, f"a whole number from 1 to {MAX_TOP_K} (or use model_skip)")
    return int(value)


def _score_threshold(attributes: Mapping[str, str], control: str) -> float | None:
    value = attributes.get("model_score_threshold")
    if value is None:
        return None
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise _bad(control, "model_score_threshold", value, "a number from 0 to 1")
    return threshold


def _heatmap(attributes: Mapping[str, str], control: str, kind: Kind) -> Heatmap | None:
    value = attributes.get("model_heatmap")
    if value is None:
        return None
    if kind != "BrushLabels":
        raise _bad(control, "model_heatmap", value, "left out: it belongs on BrushLabels")
    if value not in ("alpha", "bands", "classes"):
        raise _bad(control, "model_heatmap", value, "alpha, bands or classes")
    return cast(Heatmap, value)
