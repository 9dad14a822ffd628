"""The parts of a labelling config that concern this backend: the image, controls, and why a control is not used. Frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
KINDS: dict[str, Kind] = {kind.lower(): kind for kind in (*GEOMETRY_KINDS, *HEAD_KINDS, *DRAWN_KINDS, "TextArea")}
TOP_K_KINDS: tuple[Kind, ...] = ("RectangleLabels", "PolygonLabels", "KeyPointLabels")
MAX_TOP_K = 400


@dataclass(frozen=True)
class ImageObject:
    """The ``<Image>`` of the config that is pre-labelled.

    ``field`` is the task field that holds the image, also a nested one (``a.b[0]``); ``None`` if the value is not just
    ``$field`` (then the task needs a field ``slide``). ``pages``: the image is a ``valueList``, so each region states its
    page by ``item_index``.
    """

    name: str
    field: str | None
    pages: bool


@dataclass(frozen=True)
class Condition:
    """When the editor shows a control: while one of ``choices`` (any, if empty) of the control ``tag`` is chosen, or is not."""

    tag: str
    choices: tuple[str, ...]
    chosen: bool = True


@dataclass(frozen=True)
class Control:
    """One control that this backend can fill or learn from.

    ``labels`` are in the order of the config; empty for Number, Rating and TextArea. ``multiple``: several choices may
    be made. ``priors``: how frequent choices are, of those that say it. ``conditions``: the editor shows the control
    only while all of them hold.
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
    conditions: tuple[Condition, ...] = ()

    @property
    def region_type(self) -> str:
        """The ``type`` of this control's regions, which is also the key of the labels in their ``value``."""
        return self.kind.lower()


@dataclass(frozen=True)
class UnusedControl:
    """A control that is neither filled nor learnt from, and why, as a sentence without its subject."""

    kind: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"<{self.kind} name='{self.name}'> {self.reason}"
