"""``wsc-backend heads``: the stored versions of a project's heads; one of them in use again, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.errors import TrainingRuns
from backend.label_studio.services import Services
from backend.label_studio.teaching import Progress
from backend.label_studio.trainer import TrainingReport, put_in_use

_TOLD = ("control", "level", "kind", "n_labels", "label_counts", "calibrated", "metrics", "prior_stated")


@dataclass(frozen=True)
class StoredVersion:
    """One stored version.

    ``usable``: trained on embeddings of the model that is configured now; only such can be in use.
    ``heads``: control, level, kind, n_labels, label_counts, calibrated, metrics and prior_stated of each.
    """

    version: str
    created_at: str
    in_use: bool
    usable: bool
    heads: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class StoredVersions:
    """The versions of a project, newest first, and the one that it is at (the model's own where it uses no heads)."""

    project: int
    title: str
    version: str
    versions: Sequence[StoredVersion]

    def as_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return {**self.__dict__, "versions": [dict(version.__dict__) for version in self.versions]}


def stored_versions(services: Services, project: str) -> StoredVersions:
    """The versions of ``project`` (number or title); :class:`~backend.errors.ProjectNotFound` if there is none such."""
    found = services.client.need_project(project)
    number = int(found.id)
    services.versions.take_over(number, services.client.owner(number))
    at, fingerprint = services.versions.version(number), services.model.fingerprint
    versions = [
        StoredVersion(
            version=info.version,
            created_at=info.created_at,
            in_use=info.version == at,
            usable=info.fingerprint == fingerprint,
            heads=[{name: head.get(name) for name in _TOLD} for head in info.manifest.get("heads", ())],
        )
        for info in services.versions.registry.versions(number)
    ]
    return StoredVersions(number, str(found.title), at, versions)


def use_version(
    services: Services, project: str, version: str | None, progress: Progress = lambda *_: None
) -> TrainingReport:
    """Put ``version`` in use (``None``: no heads); every slide is scored, pushed and ranked anew.

    It stays in use until a label changes, see :func:`~backend.label_studio.trainer.put_in_use`, which also names the
    errors.

    Raises
    ------
    TrainingRuns
        Somebody is training the project: the heads would replace these.
    """
    number = int(services.client.need_project(project).id)
    state = services.training.state(number)
    if state is not None and state.status == "started":
        raise TrainingRuns(
            f"The heads of project {number} are being trained right now.", hint="Try again when that is done."
        )
    with services.training.alone(number):
        return put_in_use(services, number, version, progress)
