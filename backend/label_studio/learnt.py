"""What trained heads say of one slide, fitted to the labelling config that the project has now. Pure, no I/O."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from backend.errors import HeadMismatch
from backend.label_studio.labeling_config import HEAD_KINDS, Control, LabelingConfig
from backend.learning.figures import suggestion_words
from backend.learning.heads import Float32Array, Head, predict, tile_probabilities
from backend.learning.registry import HeadSet
from backend.learning.snapshot import Neighbour
from backend.results.bag import BagResult

log = logging.getLogger(__name__)

Region = dict[str, Any]
Value = str | float | tuple[str, ...]


@dataclass(frozen=True)
class HeadSuggestion:
    """What a head says of a slide, with its confidence in [0, 1].

    ``value``: a choice, several choices, or a number. ``probabilities``: of each choice, the most probable first; empty
    for numbers. ``notes``: sentences on how often such a suggestion is right.
    """

    control: str
    value: Value
    confidence: float
    probabilities: tuple[tuple[str, float], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TileClasses:
    """What a tile head says: ``probabilities`` float32 (N, K) for the N tiles of the bag and the K ``classes``; rows
    sum to 1."""

    control: str
    classes: tuple[str, ...]
    probabilities: Float32Array


@dataclass(frozen=True, eq=False)
class Learnt:
    """All that was learnt and concerns one slide."""

    suggestions: tuple[HeadSuggestion, ...] = ()
    tiles: tuple[TileClasses, ...] = ()
    similar: tuple[Neighbour, ...] = ()

    @property
    def confidence(self) -> float | None:
        """The prediction's score: the confidence of the least certain head, as that is what makes a slide worth
        labelling."""
        return min((float(s.confidence) for s in self.suggestions), default=None)

    def classes_for(self, control: Control) -> TileClasses | None:
        """The tile head whose classes this control's labels all have; of several its own, else the first."""
        fitting = [tiles for tiles in self.tiles if set(tiles.classes) <= set(control.labels)]
        return next((tiles for tiles in fitting if tiles.control == control.name), fitting[0] if fitting else None)

    def check(self, config: LabelingConfig) -> None:
        """Refuse suggestions that the config has no place for (:func:`learnt_of` leaves them out)."""
        for said in self.suggestions:
            control = config.control(said.control)
            if control is None or not _offers(control, said.value):
                raise HeadMismatch(
                    f"A head says {said.value!r} for '{said.control}', which the labelling config does not offer.",
                    hint="Train again, or put the control or choice back.",
                )


NOTHING_LEARNT = Learnt()


def slide_heads(heads: HeadSet, config: LabelingConfig) -> list[Head]:
    """The heads for whole slides whose controls the config still has, in the order of the config."""
    active = config.active(*HEAD_KINDS)
    return [heads.heads[c.name] for c in active if c.name in heads.heads and heads.heads[c.name].level == "slide"]


def fitting_tile_heads(heads: HeadSet, config: LabelingConfig) -> list[Head]:
    """The heads for tiles whose classes some brush control of the config can show."""
    brushes = config.active("BrushLabels")
    tile_heads = [head for head in heads.heads.values() if head.level == "tile"]
    return [head for head in tile_heads if any(set(head.classes) <= set(brush.labels) for brush in brushes)]


def learnt_of(
    result: BagResult, config: LabelingConfig, heads: HeadSet | None, similar: tuple[Neighbour, ...] = ()
) -> Learnt:
    """What ``heads`` say of a slide. For tile heads ``result`` must have its latents.

    What the config no longer offers is left out, with a line in the log: the next training forgets it.

    Raises
    ------
    EmbeddingInvalid, HeadMismatch
        The stored embedding is not finite, or of another length than the heads take.
    """
    if heads is None:
        return Learnt(similar=similar)
    suggestions = []
    for head in slide_heads(heads, config):
        output = predict(head, result.slide_embedding[None, :])
        p: tuple[tuple[str, float], ...] = ()
        if output.probabilities is not None:
            order = np.argsort(-output.probabilities[0], kind="stable")
            p = tuple((head.classes[k], float(output.probabilities[0, k])) for k in order)
        notes = tuple(suggestion_words(vars(head), output.values[0]))
        said = HeadSuggestion(head.control, output.values[0], float(output.confidence[0]), p, notes)
        control = config.control(head.control)
        if control is not None and _offers(control, said.value):
            suggestions.append(said)
        else:
            log.warning("head '%s' says %r, which its control does not offer any more", head.control, said.value)
    tiles = tuple(
        TileClasses(head.control, head.classes, tile_probabilities(head, result.latents))
        for head in fitting_tile_heads(heads, config)
    )
    return Learnt(tuple(suggestions), tiles, similar)


def suggested(control: Control, learnt: Learnt) -> list[Region]:
    """The region of a control that a head answers. Not read-only, unlike drawn regions: a suggestion is there to be
    changed."""
    said = next((s for s in learnt.suggestions if s.control == control.name), None)
    if said is None or said.confidence < (control.score_threshold or 0):
        return []
    value: Mapping[str, Any]
    if control.kind == "Choices":
        chosen = list(said.value) if isinstance(said.value, tuple) else [said.value]
        if not chosen:
            return []  # none of several choices: an empty answer is no region
        value = {"choices": chosen}
    elif control.kind == "Rating":
        value = {"rating": round(float(said.value))}  # type: ignore[arg-type]
    else:
        value = {"number": float(said.value)}  # type: ignore[arg-type]
    return [{"value": dict(value), "score": float(said.confidence), "readonly": False}]


def _offers(control: Control, value: Value) -> bool:
    if control.kind != "Choices":
        return control.kind in HEAD_KINDS and isinstance(value, int | float)
    chosen = value if isinstance(value, tuple) else (value,)
    return all(name in control.labels for name in chosen) and (control.multiple or not isinstance(value, tuple))
