"""Heads and what they were measured at, as tables for a terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from backend.commands.heads import StoredVersions
from backend.commands.train import Trained
from backend.label_studio.trainer import NOT_CONNECTED
from backend.learning.figures import class_figures, interval, patients_words, percent

_MEASURED = ("balanced accuracy", "AUROC", "calibration error")
_OF_CLASS = ("control", "said", "right (precision)", "found (recall)", "prevalence assumed", "among the labelled")
_EXAMPLES = 3
_ISSUES_KEPT = 200

ISSUE_WORDS: Mapping[str, str] = {
    "malformed": "not what Label Studio writes",
    "skipped": "skipped by the annotator",
    "label_removed": "a label that the labelling config does not have (any more)",
    "tie": "annotators disagree, no majority: not used",
    "disagreement": "annotators disagree, the majority (or median) is used",
    "image_rotated": "drawn on a turned image: not used",
    "nothing_covered": "drawn regions that cover no tile by enough",
    "no_embedding": "labelled slides without a result",
    "embedding_invalid": "stored embeddings that are not finite",
    "contradiction": "tasks that show one slide, answered differently by one annotator: the newest is used",
    "patient_unclear": "patients that are no name: the slide counts as a patient of its own",
    "conflict": "tiles with two labels by one annotator",
}


def heads_table(heads: Sequence[Mapping[str, Any]]) -> Table:
    """One row a head, or a choice where several may be chosen; intervals hold 95 %."""
    table = Table("control", "level", "labels", *_MEASURED, "calibrated")
    for head in heads:
        for row in _rows(head):
            table.add_row(*row)
    return table


def classes_table(heads: Sequence[Mapping[str, Any]]) -> Table | None:
    """One row a class that was measured: how many of its calls are right, how many of its slides are found, how
    frequent it is taken to be."""
    table = Table(*_OF_CLASS, title="of each class, at the prevalence assumed for it")
    for head in heads:
        for found in class_figures(head):
            assumed = f"{percent(found.assumed)} ({found.source})"
            figures = (interval(found.precision), interval(found.recall), assumed, percent(found.labelled))
            table.add_row(escape(str(head["control"])), escape(found.name), *figures)
    return table if table.row_count else None


def patients_lines(heads: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What the validation of each head knew of patients; one line where it is the same for all."""
    by_words: dict[str, list[str]] = defaultdict(list)
    for head in heads:
        by_words[patients_words(head["metrics"])].append(escape(str(head["control"])))
    for words, controls in by_words.items():
        yield f"{words[:1].upper()}{words[1:]}." if len(by_words) == 1 else f"{', '.join(controls)}: {words}."


def versions_table(stored: StoredVersions) -> Table:
    """The heads of every stored version; a bullet marks the one in use."""
    table = Table("", "version", "trained (UTC)", "control", "level", "labels", *_MEASURED, "calibrated")
    for version in stored.versions:
        named = version.version if version.usable else f"[dim]{escape(version.version)} (another model)[/]"
        first = ["[green]●[/]" if version.in_use else "", named, version.created_at[:19].replace("T", " ")]
        for row in (row for head in version.heads for row in _rows(head)):
            table.add_row(*first, *row)
            first = ["", "", ""]
        table.add_section()
    return table


def stored_lines(stored: StoredVersions) -> Iterator[str | Table]:
    """The heads of every stored version; of those in use also the figures of each class, and what their validation knew
    of patients."""
    yield versions_table(stored)
    heads = next((version.heads for version in stored.versions if version.in_use), ())
    classes = classes_table(heads)
    if classes is not None:
        yield classes
    yield from patients_lines(heads)


def issues_table(issues: Sequence[Mapping[str, Any]]) -> Table:
    """What taught nothing or less than it seems: how often, and where the first of each kind are."""
    by_code: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for issue in issues:
        by_code[str(issue["code"])].append(issue)
    title = f"the first {_ISSUES_KEPT}" if len(issues) >= _ISSUES_KEPT else None
    table = Table("count", "what was not used, or not as it stands", "for example", title=title)
    for code, found in sorted(by_code.items(), key=lambda entry: -len(entry[1])):
        table.add_row(str(len(found)), ISSUE_WORDS.get(code, code), "\n".join(_example(i) for i in found[:_EXAMPLES]))
    return table


def training_lines(trained: Trained) -> Iterator[str | Table]:
    """What a person wants to know of a training, in the order in which they read it."""
    report = trained.report
    moved = f"{report.previous} → [bold]{report.version}[/]" if report.version != report.previous else report.version
    yield f"{escape(trained.title)} (project {trained.project}): {moved}"
    if report.heads:
        yield heads_table(report.heads)
        classes = classes_table(report.heads)
        if classes is not None:
            yield classes
        yield from patients_lines(report.heads)
    else:
        yield "No heads yet."
    for few in report.too_few:
        yield f"Still needed: {escape(str(few['message']))}"
    for control in report.unused:
        yield f"Not used: {escape(control)}"
    if trained.issues:
        yield issues_table(trained.issues)
    if not report.connected:
        yield f"{NOT_CONNECTED[0].upper()}{NOT_CONNECTED[1:]}: connect it in Settings → Model, then train again."
    slides = report.slides + report.unanalysed
    yield (
        f"{report.labelled} of {slides} slides annotated; {report.unanalysed} without a result; "
        f"{report.pushed} predictions queued for a push, {report.ranked} slides ranked anew"
    )
    if report.pushed and not trained.publishers:
        yield "No worker is running: the pushes wait for `wsc-backend workers` (or `serve --with-workers`)."
    yield "Research use only, no diagnostic use."


def _rows(head: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    metrics, control = head["metrics"], escape(str(head["control"]))
    calibrated = "yes" if head["calibrated"] else "no"
    choices = metrics.get("choices")
    if not isinstance(choices, Mapping):
        yield control, head["level"], _labels(head), *_measured(head["kind"], metrics), calibrated
        return
    for name, measured in choices.items():
        chosen = (head.get("label_counts") or {}).get(name, "?")
        text = f"{head['n_labels']} ({chosen} chosen)"
        yield f"{control}: {escape(name)}", head["level"], text, *_measured("choice", measured), calibrated


def _labels(head: Mapping[str, Any]) -> str:
    counts = head.get("label_counts") or {}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if name)
    return escape(f"{head['n_labels']} ({told})" if told else str(head["n_labels"]))


def _measured(kind: str, metrics: Mapping[str, Any]) -> tuple[str, str, str]:
    if not metrics.get("measured"):
        return f"[dim]{escape(str(metrics.get('reason', 'not measured')))}[/]", "–", "–"
    if kind in ("number", "rating"):
        return f"mean error {_interval(metrics['mae'])}", f"R² {_interval(metrics['r2'])}", "–"
    values = (metrics.get(name) for name in ("balanced_accuracy", "auroc", "ece"))
    first, second, third = map(_interval, values)
    return first, second, third


def _interval(value: Sequence[float] | None) -> str:
    return "–" if value is None else f"{value[0]:.2f} ({value[1]:.2f} to {value[2]:.2f})"


def _example(issue: Mapping[str, Any]) -> str:
    where = f"task {issue['task_id']}" + (f", {issue['control']}" if issue.get("control") else "")
    return escape(f"{where}: {issue['detail']}")
