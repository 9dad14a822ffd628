"""What the modules of the command share: the two consoles, and what several commands do first."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from backend.errors import LicenceNotAccepted
from backend.logs import configure_logging
from backend.redaction import redactor_of
from backend.settings import Settings, licence_accepted

if TYPE_CHECKING:
    from backend.slides.discover import Found

log = logging.getLogger("backend")
console = Console()
errors = Console(stderr=True)


Slides = Annotated[
    list[Path], typer.Argument(help="Slide files, or folders that are searched for slides.", show_default=False)
]
Mpp = Annotated[
    float | None,
    typer.Option("--mpp", help="µm per pixel of slides that do not say.", min=0.05, max=5.0, show_default=False),
]
Force = Annotated[
    bool, typer.Option("--force", help="Take --mpp also for slides that say something else, because they are wrong.")
]


def forced(mpp: float | None, force: bool) -> bool:
    """``force``, or a usage error if there is nothing to force."""
    if force and mpp is None:
        raise typer.BadParameter("--force needs --mpp, the scale that is to hold.")
    return force


def need_licence() -> None:
    """Refuse to go on without the user's acceptance of mmm's licence."""
    if not licence_accepted():
        raise LicenceNotAccepted


def say_passed_over(found: Found) -> None:
    """Say in one line what a search for slides has passed over, if anything."""
    if found.passed_over:
        console.print(found.summary, highlight=False, markup=False)


def start_log(settings: Settings, process: str, level: str | None = None) -> None:
    """Log as the settings say (or at another level), without their secrets."""
    configure_logging(level or settings.log_level, process, settings.log_format, redactor_of(settings, os.environ))


def say(settings: Settings, line: str) -> None:
    """Tell the person in front of the terminal, or the program that reads the log as JSON."""
    if settings.log_format == "json":
        log.info("%s", line)
    else:
        console.print(line, highlight=False, markup=False)


def printable(text: str) -> str:
    """``text`` as any terminal can take it: a file's name may be bytes that are no text."""
    return text.encode(errors="backslashreplace").decode()


def quiet_log(settings: Settings, process: str) -> None:
    """Log what went wrong: the person sees bars and tables instead."""
    start_log(settings, process, "WARNING" if settings.log_level == "INFO" else settings.log_level)


def embedded_redis(stack: ExitStack, settings: Settings) -> None:
    """Have a Redis until ``stack`` is left: that of ``REDIS_URL``, else the embedded one, shared if another process runs it."""
    from backend.jobs.redis_server import EmbeddedRedis

    if not settings.redis_url.get_secret_value():
        stack.enter_context(EmbeddedRedis(settings.model_dir))


class StageBar(Progress):
    """A progress bar, on standard error, for what reports ``(stage, done, total)``; gone at the end."""

    def __init__(self) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counted]}"))
        super().__init__(*columns, console=errors, transient=True)
        self._task = self.add_task("", total=None, counted="")

    def stage(self, stage: str, done: int, total: int) -> None:
        """Show this."""
        counted = f"{done}/{total}" if total else ""
        self.update(self._task, description=stage, completed=done, total=total or None, counted=counted)
