"""What was done with a slide, in a few lines that an annotator reads beside it."""

from __future__ import annotations

from collections.abc import Sequence

from backend.label_studio.learnt import HeadSuggestion
from backend.learning.figures import percent
from backend.learning.snapshot import Neighbour, words
from backend.results.bag import BagResult, MppSource
from backend.results.ranks import hottest_first

_TOP = 10
_SIMILAR = 3
_SMALL_BAG = 40  # in which ten tiles would be a large part anyway: there the highest one is told
_MPP_SOURCES: dict[MppSource, str] = {
    "slide": "from the slide's file",
    "task": "stated by the task",
    "forced": "stated by the task, against the slide's file",
    "default": "assumed, by the setting DEFAULT_MPP",
    "none": "unknown",
}


def summary_text(
    result: BagResult,
    model_version: str,
    similar: Sequence[Neighbour] = (),
    suggestions: Sequence[HeadSuggestion] = (),
) -> str:
    """Lines of plain text: what was analysed, how concentrated attention is, what is suggested and how often that is
    right, which labelled slides are alike, which model, and what it is not for."""
    bag, n = result.bag, len(result.bag)
    attention = result.mean_attention[hottest_first(result.mean_attention)]
    if bag.kind == "patches":
        one, many = "patch", "patches"
        lines = [f"{n} patches analysed, as given."]
    else:
        one, many = "tile", "tiles"
        lines = [
            f"{n} tiles of tissue analysed ({bag.tile_px} px at {bag.tile_mpp:g} µm/px).",
            f"Slide scale: {bag.mpp:.4g} µm/px, {_MPP_SOURCES[bag.mpp_source]}.",
        ]
    lines += bag.notes
    if n >= _SMALL_BAG:
        share, even = float(attention[:_TOP].sum()), _TOP / n
        lines.append(
            f"The {_TOP} {many} with the highest attention hold {share:.1%} of it ({even:.1%} if spread evenly)."
        )
    elif n > 1:
        share, even = float(attention[0]), 1 / n
        lines.append(f"The {one} with the highest attention holds {share:.1%} of it ({even:.1%} if spread evenly).")
    for said in suggestions:
        lines.append(f"Suggested for '{said.control}': {words(said.value)}, {percent(said.confidence)} sure.")
        lines += said.notes
    if similar:
        told = "; ".join(
            f"{s.name} ({s.label}, {s.similarity:.2f}{', same patient' if s.same_patient else ''})"
            for s in similar[:_SIMILAR]
        )
        lines.append(f"Labelled slides most like it (cosine): {told}.")
    lines.append(f"Model: {model_version}.")
    if result.provenance.get("stand_in"):
        lines.append("This is a stand-in model for trying things out: what it shows has no medical meaning.")
    lines.append("Research use only, not for diagnosis.")
    return "\n".join(lines)
