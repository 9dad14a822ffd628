"""The stored results of a Label Studio project, for ``wsc-backend export-features --project``."""

from __future__ import annotations

from backend.commands.export_features import Progress, Source, file_name, of_key
from backend.errors import ResultNotFound
from backend.label_studio.labeling_config import parse_config
from backend.label_studio.services import Services
from backend.label_studio.teaching import Teacher


def results_of_project(
    services: Services, project: str, progress: Progress = lambda *_: None
) -> tuple[list[Source], int]:
    """The results of a project's slides under the settings and model in use, and how many tasks have none yet.

    Raises
    ------
    ProjectNotFound
        Label Studio has no such project; further errors as of :class:`~backend.label_studio.client.LabelStudioClient`.
    ResultNotFound
        No slide of the project has a result.
    """
    found = services.client.need_project(project)
    lesson = Teacher(services).lesson(int(found.id), parse_config(str(found.label_config or "")), progress)
    if not lesson.slides:
        raise ResultNotFound(
            f"No slide of project {found.id} has a result yet ({lesson.unanalysed} tasks).",
            hint="Have them analysed first: `wsc-backend import`, or “Retrieve Predictions” in the Data Manager, "
            "with workers running.",
        )
    sources = {
        slide.key: of_key(
            services.store,
            slide.key,
            f"task-{slide.task}" if slide.ref.kind == "patches" else file_name(slide.ref.locations[0]),
        )
        for slide in lesson.slides
    }
    return list(sources.values()), lesson.unanalysed
