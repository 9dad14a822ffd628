"""The commands about learning: ``train``, ``heads``, ``export``, ``simulate``."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated

import typer

from backend.cli_parts import StageBar, console, embedded_redis, errors, quiet_log
from backend.settings import Settings, load_settings

Project = Annotated[str, typer.Argument(help="Number or title of the Label Studio project.", show_default=False)]


def add_commands(app: typer.Typer) -> None:
    """Make this module's commands part of ``app``."""
    for command in (train, heads, export, simulate):
        app.command()(command)


def train(
    project: Project,
    backend_url: Annotated[
        str,
        typer.Option(
            help="Address under which Label Studio reaches this backend, if not PUBLIC_URL.", show_default=False
        ),
    ] = "",
) -> None:
    """Learn from a project's annotations now, and say what was learnt and what is still needed.

    Annotations teach by themselves while the backend and its workers run: a training starts TRAIN_DEBOUNCE_S after the
    last one, or after TRAIN_DEBOUNCE_N of them. This command does not wait for that. It also gives the webhook of a
    project that was connected by hand the secret without which its events are refused.

    Each control that labels slides (Choices, Number, Rating) or regions (two labels or more) gets a small *head* on the
    stored embeddings; slides are not read again. A choice needs two labels of two classes each, and TRAIN_MIN_LABELS in
    all. The heads are a new model version, such as `wsc-3f2a1c-h4`, and every slide is scored, pushed and ranked anew.
    What is shown as balanced accuracy, AUROC and calibration error was measured on labels that the measured model had
    not seen, nor any of the same patient where tasks name it (PATIENT_FIELD), with intervals of 95 %. How many calls of
    a class are right depends on how frequent it is: as the labelling config states (`model_prior` on a `Choice`), else
    as among the labelled. Nothing is replaced where no label, patient or stated frequency has changed.

    A worker trains if one is running (`wsc-backend workers`), else this process does.
    """
    from backend.commands.head_tables import training_lines
    from backend.commands.train import train_project
    from backend.label_studio.services import Services

    settings = _quiet("train")
    with ExitStack() as stack:
        embedded_redis(stack, settings)
        services = stack.enter_context(closing(Services(settings)))
        with StageBar() as bar:
            trained = train_project(services, project, backend_url=backend_url, progress=bar.stage, say=_say)
        for line in training_lines(trained):
            console.print(line, highlight=False)


def heads(
    project: Project,
    restore: Annotated[
        str, typer.Option("--restore", help="Put this version in use again.", metavar="VERSION", show_default=False)
    ] = "",
    retire: Annotated[bool, typer.Option("--retire", help="Use no heads; they stay stored.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """List the stored versions of a project's heads with what they were measured at; put one in use again, or none.

    `--restore` and `--retire` have every slide scored, pushed and ranked anew. What you choose stays in use until a
    label changes: trainings on the labels that there are now keep it, the first on others trains a new version.
    Versions of another model are listed, but do not fit its embeddings and cannot be restored.
    """
    from backend.commands.head_tables import stored_lines
    from backend.commands.heads import stored_versions, use_version
    from backend.label_studio.services import Services

    if restore and retire:
        raise typer.BadParameter("--restore and --retire exclude each other")
    settings = _quiet("heads")
    with ExitStack() as stack:
        services = stack.enter_context(closing(Services(settings)))
        if restore or retire:
            embedded_redis(stack, settings)
            with StageBar() as bar:
                report = use_version(services, project, restore or None, bar.stage)
            _say(f"{report.previous} → {report.version}; {report.pushed} predictions queued for a push")
        stored = stored_versions(services, project)
    if as_json:
        typer.echo(json.dumps(stored.as_dict(), indent=1))
    elif stored.versions:
        for line in stored_lines(stored):
            console.print(line, highlight=False)
    else:
        console.print(f"Project {stored.project} has no heads yet: it is at {stored.version}", highlight=False)


def export(
    project: Project,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write.", show_default=False)],
    kind: Annotated[
        str, typer.Option("--format", "-f", help="h5ad, parquet or csv; by the file's ending if left out.")
    ] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a project's slides to one file: embedding, labels, agreement, suggestions, ranks. One row for each analysed
    slide.

    Labels are those of Label Studio now; suggestions those of the heads in use; ranks those of the last training. h5ad
    (AnnData: the embeddings in X, all else in obs) and parquet need `pip install 'wsc-label-studio-backend[export]'`.
    """
    from backend.commands.export import export_project
    from backend.label_studio.services import Services

    settings = _quiet("export")
    with closing(Services(settings)) as services, StageBar() as bar:
        done = export_project(services, project, out, kind=kind, overwrite=force, progress=bar.stage, say=_say)
    console.print(f"{done.slides} slides written to {done.path}", highlight=False, soft_wrap=True)
    if done.unanalysed:
        console.print(f"{done.unanalysed} tasks without a result are left out", highlight=False)


def simulate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for learning-curves.png and learning-curves.json.")],
    seeds: Annotated[int, typer.Option(help="How often each strategy is replayed.", min=1, max=100)] = 10,
    quick: Annotated[bool, typer.Option("--quick", help="Few labels and seeds: seconds instead of minutes.")] = False,
) -> None:
    """Replay labelling on sets with known labels: learning curves of random, uncertainty, and our order of slides."""
    from backend.learning.simulate import simulate as replay
    from backend.learning.simulate import write_report

    with console.status("Replaying") as status:
        picture, table = write_report(replay(seeds=seeds, quick=quick, progress=status.update), out)
    console.print(f"Written: {picture}, {table}", highlight=False)


def _say(line: str) -> None:
    errors.print(line, highlight=False, markup=False)


def _quiet(role: str) -> Settings:
    settings = load_settings()
    quiet_log(settings, role)
    return settings
