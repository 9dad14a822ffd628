"""What the panel says beside the slide: what trained heads suggest, where the labelled slides like it are listed, what training still needs.

Computed from stored heads, the stored embedding and the snapshot of the last training; Label Studio is not asked. What
cannot be read is said in a line, and the rest of the panel is shown all the same.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from backend.errors import BackendError
from backend.label_studio.services import Services
from backend.learning.figures import class_figures, suggestion_words
from backend.learning.heads import Float32Array, Head, predict
from backend.learning.snapshot import ProjectSnapshot
from backend.results.bag import BagResult

log = logging.getLogger(__name__)


class LearntExtras:
    """The :data:`~backend.web.panel_data.Extras` of every panel; threads may share one."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def __call__(self, project: int | None, key: str, result: BagResult | None) -> Mapping[str, Any]:
        """``suggestion``, ``similar_page`` and ``learning``, as far as there are any; see :data:`~backend.web.panel_data.Extras`."""
        if result is None:
            return {}
        try:
            project = self.project_of(key) if project is None else project
            return {} if project is None else self._of(project, key, result)
        except BackendError as error:
            problem = error.message
        except OSError as error:
            problem = error.strerror or type(error).__name__
        except ValueError as error:  # arrays that fit their checksum and not each other
            problem = str(error)
        log.error("project=%s bag=%s what was learnt cannot be shown: %s", project, key, problem)
        return {"learning": [f"What was learnt cannot be shown: {problem}"]}

    def project_of(self, key: str) -> int | None:
        """The project that learnt of a bag last, for an address that names none; ``None`` if none did."""
        versions = self._services.versions
        known = {project: snapshot for project in versions.projects() if (snapshot := versions.snapshot(project))}
        having = [project for project, snapshot in known.items() if key in snapshot.row_of_key]
        return max(having, key=lambda project: str(known[project].about.get("created_at")), default=None)

    def _of(self, project: int, key: str, result: BagResult) -> dict[str, Any]:
        versions = self._services.versions
        heads, snapshot = versions.heads(project), versions.snapshot(project)
        found: dict[str, Any] = {}
        if heads is not None:
            slide_heads = [head for head in heads.heads.values() if head.level == "slide"]
            said = [suggestion_json(head, result.slide_embedding) for head in slide_heads]
            if said:
                found["suggestion"] = {"model_version": heads.version, "controls": said}
        # Who has the address of one slide is told nothing of others: which they are stands behind the password.
        if snapshot is not None and snapshot.neighbours(key, result.slide_embedding, k=1):
            found["similar_page"] = f"/slides/{key}/similar?project={project}"
        found["learning"] = self._needs(project, heads is None, snapshot)
        return {name: value for name, value in found.items() if value}

    def _needs(self, project: int, headless: bool, snapshot: ProjectSnapshot | None) -> list[str]:
        versions = self._services.versions
        if snapshot is None:
            file = versions.snapshot_file(project)
            # One of another model is no problem, only old; one that cannot be read at all is in the log too.
            return ["Which slides are alike is not known until the next training."] if file.exists() else []
        needs = [str(few["message"]) for few in snapshot.about.get("too_few", ())]
        version = str(snapshot.about.get("version"))
        if headless and version != self._services.model.model_version:
            needs.insert(0, f"The heads {version} are not in use or cannot be read; the next training makes new ones.")
        return needs


def suggestion_json(head: Head, embedding: Float32Array) -> dict[str, Any]:
    """What a head says of one slide, JSON values only: a member of ``suggestion.controls``, see
    :data:`~backend.web.panel_data.Extras`.

    Raises
    ------
    EmbeddingInvalid, HeadMismatch
        The stored embedding is not finite, or of another length than the head takes.
    """
    output = predict(head, embedding[None, :])
    about = vars(head)
    figures = {found.name: found.as_dict() for found in class_figures(about)}
    choices: list[dict[str, Any]] = []
    if output.probabilities is not None:
        p = output.probabilities[0]
        choices = [
            {"label": head.classes[k], "confidence": float(p[k]), "figures": figures.get(head.classes[k])}
            for k in np.argsort(-p, kind="stable").tolist()
        ]
    value = output.values[0]
    return {
        "control": head.control,
        "kind": head.kind,
        "value": list(value) if isinstance(value, tuple) else value,
        "confidence": float(output.confidence[0]),
        "choices": choices,
        "tolerance": None if head.classes else head.tolerance,
        "calibrated": head.calibrated,
        "labels": head.n_labels,
        "notes": suggestion_words(about, output.values[0]),
    }
