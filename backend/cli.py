"""The command ``wsc-backend``: reads arguments, calls :mod:`backend.commands` and :mod:`backend.demo`, prints what they say."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from contextlib import ExitStack, closing
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from backend import __version__, cli_exports, cli_learning, cli_predict
from backend.cli_parts import (
    Force,
    Mpp,
    Slides,
    console,
    embedded_redis,
    errors,
    forced,
    need_licence,
    printable,
    say,
    say_passed_over,
    start_log,
)
from backend.commands.bench import BENCHMARKS
from backend.errors import BackendError
from backend.logs import configure_logging
from backend.settings import load_settings

log = logging.getLogger("backend")

app = typer.Typer(
    name="wsc-backend",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Whole-slide images in Label Studio: attention heatmaps and slide embeddings by Whole Slide Concepts. "
    "**Research use only, no diagnostic use.**\n\n"
    "Settings come from environment variables; `wsc-backend settings` lists them, `wsc-backend doctor` checks them.",
)


def main() -> None:
    """Entry point: a deliberate error is one message and exit status 2, Ctrl-C is 130; anything else is a traceback."""
    try:
        app()
    except BackendError as error:
        _end(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--dir", help="Where the demo keeps its data; used again by the next run.")
    ] = Path("demo-data"),
    slides: Annotated[
        Path | None, typer.Option(envvar="SLIDES", help="A folder with your own slides.", show_default=False)
    ] = None,
    label_studio_venv: Annotated[
        Path,
        typer.Option(envvar="LABEL_STUDIO_VENV", help="Virtual environment of Label Studio; made if it is not there."),
    ] = Path(".venv-label-studio"),
    label_studio_port: Annotated[
        int, typer.Option(help="Port of Label Studio; another is taken if it is in use.")
    ] = 8080,
    once: Annotated[
        bool, typer.Option("--once", help="End when every slide is pre-annotated, instead of waiting for Ctrl-C.")
    ] = False,
) -> None:
    """Start everything on this machine and print the address to open: Label Studio, Redis, workers, backend, slides."""
    need_licence()
    from backend.demo.run import running_demo, watch

    _stop_on_sigterm()
    _log_to_file(folder / "demo.log")

    def say(line: str) -> None:
        console.print(f"[dim]·[/] {escape(line)}", highlight=False)

    with running_demo(
        folder,
        label_studio_venv=label_studio_venv.absolute(),
        slides=slides if slides and str(slides) else None,
        label_studio_port=label_studio_port,
        say=say,
    ) as running:
        console.print()
        console.print(f"  Open      [bold]{escape(running.imported.url)}[/]", highlight=False)
        console.print(f"  log in    {running.username}  /  {running.password}", highlight=False, markup=False)
        console.print(f"  backend   {running.backend_url}   log: {folder / 'demo.log'}", highlight=False, markup=False)
        if running.services.model.stand_in:
            console.print(
                "  [yellow]stand-in model: what it marks has no medical meaning. Give your own: MODEL=/path/…pt.zip[/]"
            )
        console.print("  Research use only, no diagnostic use.  Ctrl-C ends everything.\n")
        watch(running, say)
        if not once:
            say("All slides are done. Ctrl-C ends the demo.")
            threading.Event().wait()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (HOST).", show_default=False)] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (PORT).", show_default=False)] = None,
    with_workers: Annotated[
        bool, typer.Option("--with-workers", help="Start the workers of this machine as well.")
    ] = False,
) -> None:
    """Serve the protocol of Label Studio. Slides are analysed by `wsc-backend workers`, here or on other machines."""
    if with_workers:
        need_licence()
    from backend.jobs.pool import WorkerPool
    from backend.label_studio.services import Services
    from backend.web.server import bind, make_server

    _stop_on_sigterm()
    settings = load_settings(**{k: v for k, v in (("host", host), ("port", port)) if v is not None})
    start_log(settings, "serve")
    on_shutdown = None
    with ExitStack() as stack:
        listener = bind(settings.host, settings.port)
        stack.callback(listener.close)
        embedded_redis(stack, settings)
        services = stack.enter_context(closing(Services(settings)))
        services.redis_watch.need()
        if with_workers:
            pool = WorkerPool(settings)
            stack.callback(pool.stop)
            pool.start()
            on_shutdown = pool.begin_stop
        at = f"http://{settings.host}:{listener.getsockname()[1]}"
        say(settings, f"Model {services.model.model_version}; listening on {at}")
        if settings.open_to_the_network:
            log.warning(
                "HOST=%s and no password: whoever reaches this machine may read results and ask for predictions. "
                "Set BASIC_AUTH_USER and BASIC_AUTH_PASS.",
                settings.host,
            )
        make_server(services, on_shutdown).run([listener])


@app.command()
def workers(
    devices: Annotated[
        str | None, typer.Option(help="auto, cpu, or a list such as cuda:0,cuda:1 (DEVICES).", show_default=False)
    ] = None,
) -> None:
    """Analyse queued slides: one process on each device, restarted when it dies. Ctrl-C ends it in seconds; a running slide goes back to its queue."""
    need_licence()
    from backend.jobs.pool import WorkerPool
    from backend.jobs.redis_watch import RedisWatch

    _stop_on_sigterm()
    settings = load_settings(**({"devices": devices} if devices else {}))
    start_log(settings, "workers")
    with ExitStack() as stack:
        embedded_redis(stack, settings)
        with closing(RedisWatch(settings)) as watch:
            watch.need()
        pool = WorkerPool(settings)
        stack.callback(pool.stop)
        pool.start()
        say(settings, f"Workers on {', '.join(pool.devices)}")
        threading.Event().wait()


@app.command("import")
def import_(
    slides: Slides,
    project: Annotated[
        str, typer.Option("--project", "-p", help="Title or number of the Label Studio project; created if new.")
    ] = "Whole slides",
    template: Annotated[
        str,
        typer.Option(
            help="Labelling config of a new project: triage, regions, plain (no frame inside the page) or bands."
        ),
    ] = "triage",
    mpp: Mpp = None,
    force: Force = False,
    backend_url: Annotated[
        str,
        typer.Option(
            help="Address under which Label Studio reaches this backend, if not PUBLIC_URL.", show_default=False
        ),
    ] = "",
    retrieve: Annotated[bool, typer.Option(help="Start pre-labelling right away.")] = True,
) -> None:
    """Make slides tasks of a Label Studio project, connect this backend, start pre-labelling. Again adds only new slides."""
    from backend.commands.import_slides import import_slides
    from backend.label_studio.services import Services
    from backend.slides.discover import find_slides

    settings = load_settings()
    start_log(settings, "import")
    found = find_slides(slides)
    say_passed_over(found)
    with closing(Services(settings)) as services:
        done = import_slides(
            services,
            found.slides,
            project=project,
            template=template,
            mpp=mpp,
            force=forced(mpp, force),
            backend_url=backend_url,
            retrieve=retrieve,
            say=lambda line: console.print(line, highlight=False, markup=False),
        )
    console.print(
        f"{len(done.added)} slides added, {len(done.present)} were there already, {len(done.refused)} refused"
    )
    console.print(f"Open {done.url}", highlight=False, markup=False)
    if done.refused:
        raise typer.Exit(1)


@app.command()
def doctor(
    slides: Annotated[
        list[Path] | None, typer.Argument(help="Slides to look at, or folders of them.", show_default=False)
    ] = None,
    mpp: Mpp = None,
    force: Force = False,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Write a picture of each slide with its tissue outlined into this folder.", show_default=False
        ),
    ] = None,
    project: Annotated[
        str,
        typer.Option(
            "--project",
            "-p",
            help="Title or number of a project: its connection and labelling config.",
            show_default=False,
        ),
    ] = "",
) -> None:
    """Check licence, checkpoint, devices, Redis, workers, Label Studio and slides; say what is missing and what to do."""
    from backend.commands.doctor import examine

    signs = {"ok": "[green]ok[/]", "warning": "[yellow]note[/]", "problem": "[bold red]problem[/]"}
    table = Table(show_header=False, box=None, padding=(0, 1))
    for _ in range(3):
        table.add_column(overflow="fold")  # a path is of use only whole
    problems = 0
    with console.status("Looking around"):
        found = examine(load_settings(), slides or [], mpp, force=forced(mpp, force), pictures=picture, project=project)
        for finding in found:
            problems += finding.verdict == "problem"
            table.add_row(signs[finding.verdict], Text(printable(finding.subject)), Text(printable(finding.text)))
    console.print(table)
    if problems:
        raise typer.Exit(1)


@app.command()
def bench(
    only: Annotated[
        str,
        typer.Option(
            help=f"Some of {', '.join(BENCHMARKS)}; separated by commas.",
            show_default=False,
        ),
    ] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes: about a minute or two in all.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the figures and the machine as JSON.", show_default=False)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:0, …; the first of DEVICES by default.", show_default=False)
    ] = None,
) -> None:
    """Measure this machine: encoder, numerics, decoding, slides, answers, pushes, pictures, learning, growth, start. Run it alone on an idle machine.

    A benchmark that fails is named at the end, with exit status 1; the others are measured all the same.
    """
    need_licence()
    from collections.abc import Sequence

    from backend.bench.measure import Figure
    from backend.bench.report import machine, save, table
    from backend.commands.bench import chosen, run_benchmarks
    from backend.jobs.devices import devices_from

    names = chosen(only)
    settings = load_settings()
    start_log(settings, "bench", "WARNING")
    device = device or devices_from(settings.devices)[0]
    facts = machine(device)
    failed: dict[str, str] = {}

    def ended(name: str, figures: Sequence[Figure], failure: Exception | None) -> None:
        if failure is not None:
            failed[name] = f"{type(failure).__name__}: {failure}"
        if out is not None:  # after each one: what was measured is kept, whatever happens to the rest
            save(out, figures, facts, failed)

    with console.status("") as status:
        figures = run_benchmarks(
            names,
            settings,
            device,
            "quick" if quick else "full",
            on_start=lambda name: status.update(f"Measuring: {name}"),
            on_end=ended,
        )
    console.print(table(figures, facts))
    if out is not None:
        console.print(f"Written to {out}", highlight=False)
    for name, error in failed.items():
        errors.print(f"{name} failed: {error}", style="red", markup=False)
    if failed:
        raise typer.Exit(1)


cli_predict.add_commands(app)
cli_learning.add_commands(app)
cli_exports.add_commands(app)


@app.command("settings")
def settings_() -> None:
    """List every setting: variable, default, meaning."""
    from rich.markdown import Markdown

    from backend.settings import settings_table

    console.print(Markdown(settings_table()))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the release and end.")] = False) -> None:
    if version:
        console.print(__version__)
        raise typer.Exit


def _end(error: BackendError) -> None:
    """Say why the command ends: as a line of the log where a program reads that, else to a person."""
    if os.environ.get("LOG_FORMAT", "").lower() == "json":
        if not logging.getLogger().handlers:  # the settings could not even be read
            configure_logging("INFO", "wsc-backend", "json")
        log.critical("%s", error)
        return
    errors.print(f"[bold red]{type(error).__name__}[/]: {escape(printable(error.message))}", highlight=False)
    if error.hint:
        errors.print(printable(error.hint), highlight=False, markup=False)


def _stop_on_sigterm() -> None:
    def end(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what follows is the cleaning up
        sys.exit(0)

    signal.signal(signal.SIGTERM, end)


def _log_to_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The screen is for the person; what the processes log goes to a file, which the worker processes inherit.
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    keep = os.dup(2)
    os.dup2(log, 2)
    errors.file = os.fdopen(keep, "w", buffering=1)
    start_log(load_settings(), "demo")
