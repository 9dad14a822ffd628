"""``WholeSlideBackend``: this backend as a ``LabelStudioMLBase``, under our own server or under ``label_studio_ml``'s."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from backend.label_studio.events import START_TRAINING, take_event
from backend.label_studio.predictor import Predictor, Slot, Task, project_id
from backend.label_studio.services import Services, get_services

log = logging.getLogger(__name__)


def _import_base() -> Any:
    # label_studio_ml 1.0 imports torch, if it is there, only to choose how processes are started, and does without it
    # otherwise. The HTTP process must not load torch (seconds, and hundreds of MB): hide it during this one import.
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        from label_studio_ml.model import LabelStudioMLBase
    finally:
        if hidden:
            del sys.modules["torch"]
    return LabelStudioMLBase


LabelStudioMLBase: Any = _import_base()


@lru_cache(maxsize=4)
def _predictor(services: Services) -> Predictor:
    # One for all instances: the 2.x server makes an instance for each request, and the predictor remembers answers.
    return Predictor(services)


class WholeSlideBackend(LabelStudioMLBase):  # type: ignore[misc]  # the base has no types
    """Predictions for whole slides.

    Works with the base classes of ``label_studio_ml`` 1.0 (``label_config``, ``train_output``, …) and 2.x (``project_id``,
    ``label_config``). Settings come from the environment, see :mod:`backend.settings`.

    Parameters
    ----------
    project_id
        Number of the project (``7`` or ``"7.1795461014"``); where it is missing, the tasks' own ``project`` counts.
    label_config
        The project's labelling config, XML.
    services
        Parts to use instead of those made from the environment.
    """

    def __init__(
        self,
        project_id: object = None,
        label_config: str | None = None,
        *,
        services: Services | None = None,
        **kwargs: Any,
    ) -> None:
        self._own_services = services
        self._own_config = label_config
        self._own_project = project_id
        accepted = inspect.signature(LabelStudioMLBase.__init__).parameters
        if "project_id" in accepted:  # 2.x
            super().__init__(project_id=str(project_id) if project_id is not None else None, label_config=label_config)
        else:
            super().__init__(label_config=label_config, **kwargs)

    @property
    def services(self) -> Services:
        """What this model works with."""
        return self._own_services or get_services()

    def setup(self) -> None:
        """Called by the 2.x base class: state the model version."""
        if hasattr(self, "set"):
            self.set("model_version", self.services.versions.version(project_id(self._own_project, ())))

    def predict(self, tasks: Sequence[Task], context: Mapping[str, Any] | None = None, **kwargs: Any) -> list[Slot]:
        """One slot for each task: a prediction, or ``[]`` while its slide is being analysed. See :class:`Predictor`."""
        label_config = kwargs.get("label_config") or self._own_config or getattr(self, "label_config", None) or ""
        project = project_id(kwargs.get("project", self._own_project), tasks)
        return _predictor(self.services).predict(tasks, project=project, label_config=label_config, context=context)

    def fit(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Have the project's heads trained by a worker. Takes ``fit(event, data)`` (2.x) and ``fit(tasks, event=…, data=…)`` (1.0)."""
        event = kwargs.get("event") or (args[0] if args and isinstance(args[0], str) else "")
        data = kwargs.get("data") or (args[1] if len(args) > 1 else None)
        number = data.get("project", {}).get("id") if isinstance(data, Mapping) else None
        project = number if isinstance(number, int) else project_id(self._own_project, ())
        if project is None:
            log.warning("event %s without a project: nothing to train", event or "without a name")
            return {}
        return {"training": take_event(self.services, str(event or START_TRAINING), project, data)}
