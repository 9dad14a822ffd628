"""The bag key: what must be the same for a stored result to be the answer. Imports neither torch nor mmm."""

from __future__ import annotations

from backend.inference.checkpoint import ModelIdentity
from backend.results.bag import digest
from backend.settings import Settings
from backend.slides.source import SlideRef

# Raised by one whenever reading, tiling or tissue detection changes what a bag holds for the same settings.
ANALYSIS_VERSION = 3


def bag_key(ref: SlideRef, model: ModelIdentity, settings: Settings) -> str:
    """40 hexadecimal digits over the slide's identity and that of its tissue mask, the tiling and tissue settings, and
    the model's fingerprint."""
    slide = {
        "slide": ref.identity,
        "kind": ref.kind,
        "task_mpp": ref.mpp,
        "mpp_override": ref.mpp_override,
        "tissue": ref.tissue_identity,
    }
    return digest({**_for_all_slides(model, settings), **slide})


def analysis_digest(model: ModelIdentity, settings: Settings) -> str:
    """40 hexadecimal digits over what :func:`bag_key` covers beside the slide: who has the same makes the same bag of a slide under the same key."""
    return digest(_for_all_slides(model, settings))


def _for_all_slides(model: ModelIdentity, settings: Settings) -> dict[str, object]:
    return {
        "analysis": ANALYSIS_VERSION,
        "default_mpp": settings.default_mpp,
        "tile_px": settings.tile_px,
        "tile_mpp": settings.tile_mpp,
        "tissue_mpp": settings.tissue_mpp,
        "tissue_min_fraction": settings.tissue_min_fraction,
        "tissue_pen_rules": settings.tissue_pen_rules,
        "model": model.fingerprint,
    }
