"""Which controls a project has, and what each asks of us. Pure: XML in, frozen data out.

Attributes that a control may carry for us: ``model_skip`` (leave it to the annotator), ``model_top_k`` (how many
regions), ``model_score_threshold`` (lowest score of a region), ``model_prior`` (on a ``Choice``: how frequent it is
among the slides, see :mod:`backend.learning.prevalence`), ``model_heatmap`` (``alpha``, ``bands``, or ``classes``: only
what a tile head says). A control that cannot be used is named in :attr:`LabelingConfig.unused`, with the reason; the
others are used.

The config is read as Label Studio's editor reads it: names of attributes in any case, values such as ``$a.b[0]`` (see
:mod:`backend.label_studio.task_values`), conditions (``visibleWhen``) also of the views around a control.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from backend.errors import LabelConfigUnsupported, TaskFieldMissing
from backend.label_studio.control_reading import controls_of, image_of, walk
from backend.label_studio.controls import (
    DRAWN_KINDS,
    GEOMETRY_KINDS,
    HEAD_KINDS,
    MAX_TOP_K,
    Condition,
    Control,
    Heatmap,
    ImageObject,
    Kind,
    UnusedControl,
)
from backend.label_studio.task_values import MISSING, look_up

__all__ = [
    "DRAWN_KINDS",
    "EXAMPLE",
    "GEOMETRY_KINDS",
    "HEAD_KINDS",
    "MAX_TOP_K",
    "Condition",
    "Control",
    "Heatmap",
    "ImageObject",
    "Kind",
    "LabelingConfig",
    "UnusedControl",
    "load_template",
    "parse_config",
]

EXAMPLE = """<View>
  <Image name="image" value="$image" zoom="true"/>
  <BrushLabels name="attention" toName="image">
    <Label value="Attention" background="#15a34a"/>
  </BrushLabels>
</View>"""
"""The shortest labelling config that gets a heatmap."""


@dataclass(frozen=True)
class LabelingConfig:
    """The image, the controls that label it in the order of the config (skipped ones included), and those that are not used."""

    image: ImageObject
    controls: tuple[Control, ...]
    unused: tuple[UnusedControl, ...] = ()

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
        value = look_up(data, field)
        if value is MISSING:
            has = ", ".join(sorted(map(str, data))) or "no fields at all"
            raise TaskFieldMissing(
                f"The task has no field '{field}' (it has: {has}).",
                hint=f"Import the task with '{field}', or with 'slide' holding the slide's location.",
            )
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
        Not XML, XML with a DOCTYPE (never needed, and the way to entity expansion), no image, two controls of one name, or no
        control that this backend can fill. The message says what to add.
    """
    places = list(walk(_parse_xml(xml)))
    images = {image.name: image for place in places if (image := image_of(place)) is not None}
    if not images:
        if any(place.repeated and place.element.tag.lower() == "image" for place in places):
            raise LabelConfigUnsupported(
                "The only <Image> of the labelling config stands in a <Repeater>, whose images are other ones in each task.",
                hint=f"Put the slide's image outside of it. A config that works:\n{EXAMPLE}",
            )
        raise LabelConfigUnsupported(
            'The labelling config has no <Image name="…" value="$field"/>.', hint=f"A config that works:\n{EXAMPLE}"
        )
    controls: list[Control] = []
    unused: list[UnusedControl] = []
    for read in controls_of(places, images):
        if isinstance(read, Control):
            controls.append(read)
        else:
            unused.append(read)
    names = [control.name for control in controls] + [control.name for control in unused]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise LabelConfigUnsupported(f"The labelling config has two controls named '{doubled}'.")
    ours = [control for control in controls if not control.skip and control.kind not in DRAWN_KINDS]
    if not ours:
        raise _nothing_for_us(controls, unused)
    # The image is the one that our regions are drawn on; others may show the same picture, or are for looking at.
    first = next((control for control in ours if control.kind in GEOMETRY_KINDS), ours[0])
    image = images[first.to_name]
    here = [control for control in controls if _same_picture(images[control.to_name], image)]
    for control in controls:
        if control not in here and not control.skip:
            what = f"labels the image '{control.to_name}', and one slide a task is analysed: that of '{image.name}'"
            unused.append(UnusedControl(control.kind, control.name, what))
    return LabelingConfig(image, tuple(here), tuple(unused))


def _same_picture(one: ImageObject, other: ImageObject) -> bool:
    return one.name == other.name or (one.field is not None and (one.field, one.pages) == (other.field, other.pages))


def _nothing_for_us(controls: list[Control], unused: list[UnusedControl]) -> LabelConfigUnsupported:
    fillable = (*GEOMETRY_KINDS, *HEAD_KINDS, "TextArea")
    reasons = [str(control) + "." for control in unused if control.kind in fillable]
    if reasons:
        why = " ".join(reasons[:3])
    elif any(control.kind not in DRAWN_KINDS for control in controls):
        why = 'Every control that this backend can fill has model_skip="true".'
    else:
        why = (
            "The labelling config has no control that this backend can fill: it has no "
            + ", ".join((*GEOMETRY_KINDS, *HEAD_KINDS))
            + " or TextArea for the image."
        )
    return LabelConfigUnsupported(why, hint=f"A config that works:\n{EXAMPLE}")


def load_template(name: str) -> str:
    """The XML of a shipped labelling config: ``triage``, ``regions``, ``plain``, ``bands`` or ``patches``."""
    folder = resources.files("backend.label_studio") / "templates"
    names = sorted(item.name[:-4] for item in folder.iterdir() if item.name.endswith(".xml"))
    if name not in names:
        raise LabelConfigUnsupported(f"There is no template '{name}'.", hint=f"Shipped: {', '.join(names)}.")
    return (folder / f"{name}.xml").read_text(encoding="utf-8")


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
