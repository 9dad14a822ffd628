"""Learning curves as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backend.learning.simulate import Curves

# Okabe and Ito's colours, told apart by most colour-blind people; the baseline is grey.
_LOOK = {
    "random": ("random", "#7a7a7a", (0, (4, 2))),
    "uncertainty": ("uncertainty only", "#E69F00", "-"),
    "default": ("our default: uncertain and diverse", "#0072B2", "-"),
}
_INK, _FAINT = "#222222", "#dddddd"
_PLATE = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 2}


def draw_curves(curves: Sequence[Curves], path: Path) -> None:
    """One panel for each set: mean balanced accuracy by number of labels, with 95 % intervals, as a PNG at ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # The figure itself, without pyplot: nothing global, and no screen is looked for.
    figure = Figure(figsize=(6.2 * len(curves), 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, curve in zip(panels, curves, strict=True):
        _draw(panel, curve)
    panels[0].set_ylabel("balanced accuracy on held-out items", color=_INK)
    figure.savefig(path)


def _draw(panel: Any, curve: Curves) -> None:
    n = curve.n_labels
    for strategy in curve.accuracy:
        name, colour, line = _LOOK.get(strategy, (strategy, "#009E73", "-"))
        mean, low, high = curve.interval(strategy)
        panel.fill_between(n, low, high.clip(max=1), color=colour, alpha=0.15, linewidth=0)
        panel.plot(n, mean, color=colour, linestyle=line, linewidth=2, label=name)
    goal = float(curve.accuracy["random"].mean(axis=0)[-1])
    panel.axhline(goal, color=_INK, linewidth=0.8, linestyle=":")
    needed = curve.labels_to_match_random("default") if "default" in curve.accuracy else None
    text = f"random with {n[-1]} labels: {goal:.3f}"
    if needed is not None:
        reached = float(curve.interval("default")[0][list(n).index(needed)])
        panel.plot([needed], [reached], "o", color=_LOOK["default"][1], markersize=7, zorder=5)
        panel.vlines(needed, 0, reached, color=_LOOK["default"][1], linewidth=0.8, linestyle=":")
        text += f"\nour default: with {needed}"
    bottom = min(float(curve.interval(s)[1].min()) for s in curve.accuracy)
    panel.set_ylim(max(0.0, bottom - 0.04), 1.01)
    panel.set_xlim(0, n[-1])
    panel.text(0.98, 0.40, text, transform=panel.transAxes, ha="right", va="top", fontsize=9, color=_INK, bbox=_PLATE)
    seeds = len(curve.accuracy["random"])
    panel.set_title(f"{curve.dataset} ({seeds} seeds, mean and 95 % interval)", fontsize=11, loc="left", color=_INK)
    panel.set_xlabel("labels", color=_INK)
    panel.grid(color=_FAINT, linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.legend(loc="lower right", facecolor="white", framealpha=0.8, edgecolor="none", fontsize=9)
