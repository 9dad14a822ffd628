"""What an event of Label Studio means for learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.label_studio.services import Services

WEBHOOK_SECRET_HEADER = "X-WSC-Webhook-Secret"
START_TRAINING = "START_TRAINING"
_ANNOTATION_EVENTS = ("ANNOTATION_CREATED", "ANNOTATIONS_CREATED", "ANNOTATION_UPDATED", "ANNOTATIONS_DELETED")


def take_event(services: Services, action: str, project: int, event: Mapping[str, Any] | None) -> str:
    """Write down what an event asks for; nothing is computed here.

    Returns
    -------
    ``queued``, ``scheduled``, ``again`` (a training runs, and will run once more), or ``nothing to do``.

    Raises
    ------
    QueueUnavailable
        Redis does not answer.
    """
    training = services.training
    if action == START_TRAINING:
        training.note_connection(project, True)  # Label Studio sends it to connected backends alone
        return training.train_now(project)
    if training.is_disconnected(project):
        return "nothing to do"  # its webhook stays when a project disconnects us; said when that was found out
    if action in _ANNOTATION_EVENTS:
        many = (event or {}).get("annotations")
        return training.note_annotations(project, len(many) if isinstance(many, list) and many else 1)
    if action == "TASKS_DELETED":
        return training.note_slides(project)  # their labels go with them
    if action == "PROJECT_UPDATED":
        # Sent for every change of a project, our own new version included: only other controls or labels matter.
        about = (event or {}).get("project")
        config = about.get("label_config") if isinstance(about, Mapping) else None
        if isinstance(config, str) and training.config_changed(project, config):
            return training.note_annotations(project, 0)
    return "nothing to do"
