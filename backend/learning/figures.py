"""What a head's metrics mean, in words and as rows: for the terminal, the overview, the panel and the summary beside a
slide. Pure.

Reads metrics as they are stored, also those of earlier releases, which know nothing of patients and prevalence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LOW_PRECISION = 0.5
"""A suggestion of a class of whose calls a smaller part is right says that few are."""

Interval = Sequence[float]


@dataclass(frozen=True)
class ClassFigures:
    """Of one class, or one of several choices.

    Attributes
    ----------
    name
        As the annotators call it.
    precision, recall
        ``[value, low, high]``: how many of those called so are so, and how many of those that are so are called so;
        ``None`` where not measured.
    assumed, labelled
        How frequent it is taken to be, and how frequent it is among the labelled.
    stated
        Whether the project states its frequency.
    """

    name: str
    precision: Interval | None
    recall: Interval | None
    assumed: float
    labelled: float
    stated: bool

    @property
    def source(self) -> str:
        """Where the frequency comes from, in words."""
        return "as the project states" if self.stated else "as among the labelled"

    def as_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.__dict__,
            "precision": _list(self.precision),
            "recall": _list(self.recall),
            "source": self.source,
        }


def patients_words(metrics: Mapping[str, Any]) -> str:
    """Whether slides of one patient may stand on both sides of the validation that these metrics come from."""
    known = metrics.get("patients")
    if not isinstance(known, Mapping) or not known.get("patients"):
        return "patients unknown: slides of one patient may stand on both sides of the validation"
    text = f"slides of {known['patients']} patients, each on one side of the validation"
    if known["unknown"]:
        text += f"; {known['unknown']} of {known['slides']} slides have no patient, each counts as one of its own"
    return text


def class_figures(head: Mapping[str, Any]) -> list[ClassFigures]:
    """The figures of each class of a head, given as training reports it (``kind``, ``metrics`` and ``prior_stated``);
    none where nothing was measured."""
    metrics, stated = head["metrics"], head.get("prior_stated") or ()
    choices = metrics.get("choices")
    if isinstance(choices, Mapping):
        entries = {name: (found.get("per_class") or {}).get("yes") for name, found in choices.items()}
    else:
        entries = dict(metrics.get("per_class") or {})
    single = not isinstance(choices, Mapping)
    return [
        ClassFigures(
            name=name,
            precision=entry.get("precision"),
            recall=entry.get("recall"),
            assumed=float(entry["prevalence"]["assumed"]),
            labelled=float(entry["prevalence"]["labelled"]),
            # With one class of a single choice stated, what is left for the others is too.
            stated=bool(stated) if single else name in stated,
        )
        for name, entry in entries.items()
        if entry is not None and "prevalence" in entry
    ]


def suggestion_words(head: Mapping[str, Any], value: object) -> list[str]:
    """What should be known beside a suggestion: how many like it are right, how rare that is, and what the validation
    knew of patients."""
    metrics = head["metrics"]
    lines = []
    if not metrics.get("measured"):
        reason = metrics.get("reason") or "no choice has labels enough"
        return [f"How often it is right is not measured yet ({reason})."]
    said = value if isinstance(value, tuple | list) else (value,)
    for found in class_figures(head):
        if found.name in said:
            lines.append(_of_class(found))
    text = patients_words(metrics)
    return [*lines, f"{text[:1].upper()}{text[1:]}."]


def _of_class(found: ClassFigures) -> str:
    frequent = f"a prevalence of {percent(found.assumed)} ({found.source})"
    if found.precision is None:
        return f"How many of those called {found.name!r} are right is not measured."
    value, low, high = found.precision
    right = (
        f"{percent(value)} ({percent(low)} to {percent(high)}) of those called {found.name!r} are right at {frequent}."
    )
    return f"Few are right at this prevalence: {right}" if value < LOW_PRECISION else right


def percent(part: float) -> str:
    """``5 %``; with a digit more below 1 %, so that what is rare is not nothing."""
    return f"{100 * part:.2g} %" if 0 < part < 0.01 else f"{100 * part:.0f} %"


def interval(row: Interval | None) -> str:
    """``9 % (5 % to 14 %)``, or a dash."""
    return "–" if row is None else f"{percent(row[0])} ({percent(row[1])} to {percent(row[2])})"


def _list(row: Interval | None) -> list[float] | None:
    return None if row is None else [float(part) for part in row]
