"""Fields of our own in the data of users' tasks: each is written alone, and what users have there stays as it is."""

from __future__ import annotations

from collections.abc import Mapping

from backend.errors import LabelStudioError
from backend.label_studio.client import LabelStudioClient

_UNLIKE_MAX = 2
"""One task may be edited by somebody between two looks at it; another one right after it is no coincidence."""


class TaskFields:
    """Writes fields into the tasks of a project.

    It looks at each task before and after: no version of Label Studio promises that the other fields stay.
    """

    def __init__(self, client: LabelStudioClient, project: int) -> None:
        self._client = client
        self._project = project
        self._unlike: list[str] = []

    def set(self, task: int, fields: Mapping[str, float | None]) -> None:
        """Set some fields of a task; ``None`` is ``null``.

        Raises
        ------
        LabelStudioError
            Label Studio changes other fields with them: no further task is touched.
        TaskGone, LabelStudioUnreachable
            As of :class:`~backend.label_studio.client.LabelStudioClient`.
        """
        before = self._client.task(task)
        for name, value in fields.items():
            self._client.set_task_field(self._project, task, name, value)
        after = self._client.task(task)
        changed = [name for name in sorted({*before, *after} - set(fields)) if before.get(name) != after.get(name)]
        if not changed:
            self._unlike.clear()
            return
        self._unlike.append(f"of task {task}: {', '.join(f'{n} was {before.get(n)!r:.200}' for n in changed)}")
        if len(self._unlike) >= _UNLIKE_MAX:
            raise LabelStudioError(
                f"With {', '.join(fields)}, other fields changed too, {'; '.join(self._unlike)}. No further task is written to.",
                hint="Set RANK_TASKS=false, and put those fields right in Label Studio.",
            )
