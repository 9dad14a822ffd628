"""From the elements of a labelling config to its images and controls, as Label Studio's editor reads them. Pure functions."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from backend.label_studio.controls import (
    DRAWN_KINDS,
    GEOMETRY_KINDS,
    KINDS,
    MAX_TOP_K,
    TOP_K_KINDS,
    Condition,
    Control,
    Heatmap,
    ImageObject,
    Kind,
    UnusedControl,
)
from backend.label_studio.task_values import field_of


@dataclass(frozen=True)
class Place:
    """An element, its attributes by lower-case name (the editor ignores their case), and what the elements around it say."""

    element: ET.Element
    attributes: Mapping[str, str]
    repeated: bool
    shown_when: tuple[Mapping[str, str], ...]


def walk(root: ET.Element) -> Iterator[Place]:
    """All elements in the order of the document. Without recursion: a config comes from outside, and may be nested deeply."""
    waiting: list[tuple[ET.Element, bool, tuple[Mapping[str, str], ...]]] = [(root, False, ())]
    while waiting:
        element, repeated, around = waiting.pop()
        attributes = {name.lower(): value for name, value in element.attrib.items()}
        if attributes.get("visiblewhen"):
            around = (*around, attributes)
        yield Place(element, attributes, repeated, around)
        repeated = repeated or element.tag.lower() == "repeater"
        waiting += [(child, repeated, around) for child in reversed(element)]


def image_of(place: Place) -> ImageObject | None:
    attributes = place.attributes
    name, pages = attributes.get("name"), "valuelist" in attributes
    value = attributes.get("valuelist") or attributes.get("value")
    if place.element.tag.lower() != "image" or not name or not value or place.repeated:
        return None
    return ImageObject(name, field_of(value), pages)


class _Unusable(Exception):
    """Why a control cannot be used, as a sentence without its subject."""


def controls_of(places: Sequence[Place], images: Mapping[str, ImageObject]) -> Iterator[Control | UnusedControl]:
    for place in places:
        tag, attributes = place.element.tag, place.attributes
        kind, name, to_names = KINDS.get(tag.lower()), attributes.get("name"), _split(attributes.get("toname"))
        if not name or not attributes.get("toname"):
            continue
        to_name = next((part for part in to_names if part in images), None)
        if place.repeated:
            if kind is not None:
                why = "stands in a <Repeater>, whose controls are other ones in each task: it is the annotator's"
                yield UnusedControl(kind, name, why)
            continue
        if to_name is None:
            continue  # it labels something else than an image
        if kind is None:
            yield UnusedControl(tag, name, "is of a kind that is neither filled nor learnt from")
            continue
        try:
            yield _control(place, kind, name, to_name)
        except _Unusable as error:
            yield UnusedControl(kind, name, str(error))


def _control(place: Place, kind: Kind, name: str, to_name: str) -> Control:
    attributes = place.attributes
    skip = _flag(attributes, "model_skip")
    for attribute, what in (("perregion", "regions"), ("peritem", "pages")):
        if attributes.get(attribute, "").lower() == "true":
            raise _Unusable(f"asks about single {what}: it is the annotator's")
    if not skip and kind in (*GEOMETRY_KINDS, *DRAWN_KINDS, "Choices") and field_of(attributes.get("value", "")):
        raise _Unusable(f"takes its labels from each task ({attributes['value']}): it is the annotator's")
    multiple = kind == "Choices" and attributes.get("choice", "single").startswith("multiple")
    control = Control(
        kind=kind,
        name=name,
        to_name=to_name,
        labels=_labels(place.element),
        skip=skip,
        top_k=_top_k(attributes, kind),
        score_threshold=_score_threshold(attributes),
        heatmap=_heatmap(attributes, kind),
        smart=_flag(attributes, "smart"),
        multiple=multiple,
        priors=_priors(place.element, kind, multiple=multiple),
        conditions=() if kind in (*GEOMETRY_KINDS, *DRAWN_KINDS) else tuple(_conditions(place)),
    )
    _check_labels(control)
    return control


def _conditions(place: Place) -> Iterator[Condition]:
    """What has to hold for the editor to show an answer; regions are shown whatever holds for their labels."""
    for attributes in place.shown_when:
        when = attributes["visiblewhen"].lower()
        if when == "no-region-selected":
            continue  # as the task is opened
        if when not in ("choice-selected", "choice-unselected") or not attributes.get("whentagname"):
            raise _Unusable(
                f'is shown only at times (visibleWhen="{attributes["visiblewhen"]}"): it is the annotator\'s'
            )
        choices = tuple(part for part in _split(attributes.get("whenchoicevalue")) if part)
        yield Condition(attributes["whentagname"], choices, chosen=when == "choice-selected")


def _split(names: str | None) -> list[str]:
    return [part.strip() for part in (names or "").split(",")]


def _children(element: ET.Element) -> list[dict[str, str]]:
    """The attributes of each ``<Label>`` or ``<Choice>``."""
    children = (child for child in element.iter() if child.tag.lower() in ("label", "choice"))
    return [{name.lower(): value for name, value in child.attrib.items()} for child in children]


def _labels(element: ET.Element) -> tuple[str, ...]:
    """What a region states for each ``<Label>`` or ``<Choice>``: its alias if it has one, else its value."""
    return tuple(value for child in _children(element) if (value := child.get("alias") or child.get("value")))


def _priors(element: ET.Element, kind: Kind, *, multiple: bool) -> tuple[tuple[str, float], ...]:
    """How frequent the project says that choices are: each in (0, 1), and of a single choice 1 together."""
    found: list[tuple[str, float]] = []
    children = _children(element)
    for child in children:
        text, name = child.get("model_prior"), child.get("alias") or child.get("value")
        if text is None or not name:
            continue
        if kind != "Choices":
            raise _bad("model_prior", text, "left out: it belongs on a Choice")
        try:
            prior = float(text)
        except ValueError:
            prior = math.nan
        if not 0 < prior < 1:
            raise _bad("model_prior", text, "a number between 0 and 1, such as 0.05 for one slide in twenty")
        found.append((name, prior))
    total = sum(prior for _, prior in found)
    if not multiple and found and (total > 1.01 or (len(found) == len(children) and total < 0.99)):
        raise _Unusable(
            f"has choices whose model_prior sum to {total:.4g}, not to 1: state how frequent each is among the slides "
            "(those without it share what is left)"
        )
    return tuple(found)


def _check_labels(control: Control) -> None:
    if control.skip or control.kind in ("Number", "Rating", "TextArea", *DRAWN_KINDS):
        return
    if not control.labels:
        child = "Choice" if control.kind == "Choices" else "Label"
        raise _Unusable(
            f'has no <{child}> with a fixed value: add one, such as <{child} value="Attention"/>, '
            'or leave the control to the annotator by model_skip="true"'
        )
    if control.heatmap == "bands" and len(control.labels) < 2:
        raise _Unusable(
            'asks for model_heatmap="bands" and has one label: bands need a label each, lowest attention first '
            '(or use model_heatmap="alpha")'
        )


def _bad(attribute: str, value: str, wanted: str) -> _Unusable:
    return _Unusable(f"has {attribute}={value!r}, which must be {wanted}")


def _flag(attributes: Mapping[str, str], attribute: str) -> bool:
    value = attributes.get(attribute, "false")
    if value.lower() not in ("true", "false", "1", "0"):
        raise _bad(attribute, value, "true or false")
    return value.lower() in ("true", "1")


def _top_k(attributes: Mapping[str, str], kind: Kind) -> int | None:
    value = attributes.get("model_top_k")
    if value is None:
        return None
    if kind not in TOP_K_KINDS:
        raise _bad("model_top_k", value, f"left out: it belongs on {', '.join(TOP_K_KINDS)}")
    if not re.fullmatch(r"[0-9]{1,9}", value.strip()) or not 1 <= int(value) <= MAX_TOP_K:
        raise _bad("model_top_k", value, f"a whole number from 1 to {MAX_TOP_K} (or use model_skip)")
    return int(value)


def _score_threshold(attributes: Mapping[str, str]) -> float | None:
    value = attributes.get("model_score_threshold")
    if value is None:
        return None
    try:
        threshold = float(value)
    except ValueError:
        threshold = math.nan
    if not 0 <= threshold <= 1:
        raise _bad("model_score_threshold", value, "a number from 0 to 1")
    return threshold


def _heatmap(attributes: Mapping[str, str], kind: Kind) -> Heatmap | None:
    value = attributes.get("model_heatmap")
    if value is None:
        return None
    if kind != "BrushLabels":
        raise _bad("model_heatmap", value, "left out: it belongs on BrushLabels")
    if value not in ("alpha", "bands", "classes"):
        raise _bad("model_heatmap", value, "alpha, bands or classes")
    return cast(Heatmap, value)
