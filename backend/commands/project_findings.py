"""What ``doctor --project`` says of one project: its connection, and what of its labelling config can be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Literal

from backend.label_studio.client import LabelStudioClient
from backend.label_studio.controls import DRAWN_KINDS, Kind
from backend.label_studio.labeling_config import parse_config
from backend.redaction import shown_address
from backend.settings import Settings

Line = tuple[Literal["ok", "warning", "problem"], str]


def project_findings(settings: Settings, project: str) -> Iterator[Line]:
    """Verdict and text of each line; ``project`` is a number or title.

    Raises
    ------
    ProjectNotFound, LabelStudioError, LabelStudioUnreachable
        There is no such project; Label Studio refuses, or does not answer.
    LabelConfigUnsupported
        Its labelling config has nothing for this backend.
    """
    with closing(LabelStudioClient(settings)) as client:
        found = client.need_project(project)
        urls = client.connected_urls(int(found.id), settings.browser_url)
    if urls:
        yield "ok", f"“{found.title}” is connected to this backend at {', '.join(map(shown_address, urls))}"
    else:
        yield (
            "problem",
            f"“{found.title}” is not connected to this backend: nothing is pre-labelled, and annotations teach nothing. "
            f"Connect it in Settings → Model (address: {shown_address(settings.browser_url)}), or run `wsc-backend import`",
        )
    config = parse_config(str(found.label_config or ""))
    for control in config.controls:
        yield "ok", f"<{control.kind} name='{control.name}'> {_use_of(control.kind, control.skip)}"
    for unused in config.unused:
        yield "warning", f"{unused}"


def _use_of(kind: Kind, skip: bool) -> str:
    if kind in DRAWN_KINDS or skip:
        return "is left to the annotator"
    return "is filled"
