"""The command ``predict``: slides without Label Studio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from backend.cli_exports import features_of_folders
from backend.cli_parts import Force, Mpp, Slides, console, forced, need_licence, quiet_log, say_passed_over
from backend.settings import load_settings

if TYPE_CHECKING:  # the command imports what it needs, after the licence
    from backend.commands.predict import Outcome
    from backend.inference.engine import Engine


def add_commands(app: typer.Typer) -> None:
    """Make this module's command part of ``app``."""
    app.command()(predict)


def predict(
    slides: Slides,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the results, one subfolder a slide.")],
    mpp: Mpp = None,
    force: Force = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda:0, …; the first of DEVICES by default.", show_default=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Analyse also what is analysed already.")] = False,
    layout: Annotated[
        str,
        typer.Option(
            help="Write the features for clam or trident as well, into a folder of that name in --out; "
            "`export-features` does so later.",
            show_default=False,
        ),
    ] = "",
    level0: Annotated[
        bool,
        typer.Option(
            "--level0",
            help="GeoJSON in level-0 coordinates. QuPath's differ where a slide states its scanned area "
            "(mrxs, scn, czi, bif).",
        ),
    ] = False,
) -> None:
    """Analyse slides without Label Studio: heatmap PNG, regions JSON, HDF5, GeoJSON for QuPath; features for CLAM or
    TRIDENT.

    Running it again analyses only what is not there yet.
    """
    need_licence()  # before seconds of imports
    forced(mpp, force)
    from backend.commands.hints import explain
    from backend.commands.predict import predict_files
    from backend.commands.result_folders import check_writable
    from backend.results.features import layout_named
    from backend.slides.discover import find_slides

    if layout:
        layout_named(layout)
    settings = load_settings()
    quiet_log(settings, "predict")
    check_writable(out)
    found = find_slides(slides)
    count = len(found.slides)
    say_passed_over(found)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[counted]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", counted="", total=None)

        def load() -> Engine:
            from backend.inference.engine import load_engine
            from backend.jobs.devices import devices_from

            bar.update(task, counted="loading the model")
            engine = load_engine(settings, device or devices_from(settings.devices)[0])
            if engine.identity.stand_in:
                bar.console.print(
                    "[yellow]This is the stand-in model: its results have no medical meaning. Set MODEL.[/]"
                )
            return engine

        def on_look(number: int, slide: Path) -> None:
            bar.update(task, description=f"Looking at {slide.name}", completed=number, total=count)

        def on_slide(number: int, slide: Path) -> None:
            bar.reset(task, description=f"[{number + 1}/{count}] {slide.name}", total=None, counted="")

        def on_error(outcome: Outcome) -> None:
            assert outcome.error is not None
            bar.console.print(Text.assemble((f"{outcome.slide}: ", "bold"), (explain(outcome.error), "red")))

        def progress(stage: str, done: int, total: int) -> None:
            counted = f"{stage} {done}/{total} tiles" if total else stage
            bar.update(task, completed=done, total=total or None, counted=counted)

        outcomes = predict_files(
            found.slides,
            out,
            settings,
            load,
            mpp=mpp,
            force=force,
            again=again,
            level0=level0,
            on_look=on_look,
            on_slide=on_slide,
            on_error=on_error,
            progress=progress,
        )
        bar.update(task, visible=False)
    console.print(_predicted(outcomes))
    for outcome in outcomes:
        for note in outcome.notes:
            console.print(f"{outcome.slide.name}: {note}", highlight=False, markup=False)
    failed = any(outcome.error for outcome in outcomes)
    if layout:
        folders = [outcome.folder for outcome in outcomes if outcome.folder is not None]
        failed |= not features_of_folders(folders, out / layout, layout)
    if failed:
        raise typer.Exit(1)


def _predicted(outcomes: Sequence[Outcome]) -> Table:
    """What became of each slide of `predict`."""
    from backend.commands.hints import explain

    table = Table()
    for title in ("slide", "tiles", "µm/px", "written to"):
        table.add_column(title, overflow="fold")  # a path is of use only whole
    for column in table.columns:
        column.overflow = "fold"  # a path that is cut off is none
    origins = {"analysed": "", "folder": " (was there already)", "store": " (from the store of results)"}
    of_name = Counter(outcome.slide.name for outcome in outcomes)
    for outcome in outcomes:
        name = escape(outcome.slide.name if of_name[outcome.slide.name] == 1 else str(outcome.slide))
        if outcome.error is not None or outcome.bag is None:
            table.add_row(name, "–", "–", f"[red]{escape(explain(outcome.error)) if outcome.error else ''}[/]")
        else:
            scale = f"{outcome.bag.mpp:.4f} ({outcome.bag.mpp_source})"
            table.add_row(name, str(len(outcome.bag)), scale, f"{escape(str(outcome.folder))}{origins[outcome.origin]}")
    return table
