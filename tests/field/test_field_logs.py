"""Quiet logs: what is ordinary is no warning, slides have the names that people give them, and a log of JSON holds nothing else."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.redis_rig import free_port
from redis import Redis

from backend.commands.export_features import file_name
from backend.jobs.job_forms import JobForms
from backend.jobs.queue import BagRequest, WaitingTask
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.patients import patient_of
from backend.label_studio.teaching import Slide
from backend.results.bag import digest
from backend.settings import Settings
from backend.slides.names import slide_name
from backend.slides.source import SlideRef

KEY = digest({"slide": "a"})


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/data/local-files/?d=slides/x.svs", "x.svs"),
        ("http://studio:8080/ls/data/local-files/?d=slides/a%20b%2Fx%20y.svs", "x y.svs"),
        ("http://studio/tasks/1/resolve/?fileuri=czM6Ly9idWNrZXQvZm9sZGVyL3ouc3Zz", "z.svs"),
        ("https://store/b/c.svs?X-Amz-Signature=0011&d=nothing", "c.svs"),
        ("/data/upload/7/3f-uploaded.tif", "3f-uploaded.tif"),
        ("s3://bucket/folder/100%25.svs", "100%.svs"),
        ("/slides/what? is#this %20.svs", "what? is#this %20.svs"),
        ("http://[::1/x.svs", "x.svs"),
        ("C:/odd", "odd"),
    ],
)
def test_a_slide_is_called_by_the_name_of_its_file(location: str, name: str) -> None:
    assert slide_name(location) == name
    ref = SlideRef("http", (location,), "1")
    assert Slide(0, 1, {}, KEY, ref).name == name
    assert file_name(location) == name


def test_a_barcode_is_found_in_the_name_that_a_storage_of_label_studio_gives() -> None:
    ref = SlideRef("label_studio", ("http://studio/data/local-files/?d=slides/TCGA-A1-0001-01Z-00-DX1.svs",), "1")
    assert patient_of({}, ref, Settings(patient_from="tcga")) is not None


def test_the_job_of_a_local_file_of_label_studio_is_about_that_file(settings: Settings, redis: Redis) -> None:
    slide = {"locations": ["http://studio/data/local-files/?d=slides/x.svs"], "kind": "label_studio", "identity": "1"}
    job = JobForms(Settings(), redis).analysis(BagRequest(KEY, slide), "batch")
    assert job.description == "analyse x.svs"


@pytest.mark.parametrize("command", ["serve", "serve --with-workers", "workers"])
def test_a_log_of_json_is_json_to_its_last_line(command: str, tmp_path: Path, stand_in: Path) -> None:
    (tmp_path / "cache" / "models").mkdir(parents=True)
    (tmp_path / "cache" / "models" / stand_in.name).symlink_to(stand_in)
    settings = {
        "MODEL_DIR": str(tmp_path),
        "LOG_FORMAT": "json",
        "DEVICES": "cpu",
        "HOST": "0.0.0.0",
        "PORT": str(free_port()),
    }
    log = tmp_path / "said"
    with log.open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "backend", *command.split()],
            env={**os.environ, **settings},
            stdout=said,
            stderr=said,
        )
        wanted = ": ready, queues" if "workers" in command else "listening on"
        deadline = time.monotonic() + 120
        while wanted not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        process.wait(60)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any(wanted in line["message"] for line in lines)
    if command != "workers":
        assert any("HOST=0.0.0.0 and no password" in line["message"] for line in lines)


def test_a_command_that_ends_with_an_error_says_so_as_json(tmp_path: Path) -> None:
    for variables in ({"PORT": "x"}, {"REDIS_URL": "redis://:a/b@h"}, {"MODEL": str(tmp_path / "none.zip")}):
        environment = {**os.environ, "LOG_FORMAT": "json", "MODEL_DIR": str(tmp_path), **variables}
        done = subprocess.run(
            [sys.executable, "-m", "backend", "serve"], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 2 and done.stdout == ""
        assert [json.loads(line)["level"] for line in done.stderr.splitlines()][-1] == "CRITICAL"


def test_opening_tasks_leaves_no_warning_in_the_log(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """A push that waits because the answer to the same task is on its way is no failure: nothing is wrong."""
    from backend.errors import BackendError
    from backend.jobs import tasks
    from backend.jobs.bag_worker import BagWorker
    from backend.jobs.tallies import read_tallies
    from backend.label_studio.publisher import TaskBusy

    settings = Settings(model_dir=tmp_path, redis_url=embedded_redis.url, devices="cpu")
    context = tasks.WorkerContext(settings, redis)

    def busy(*_: object) -> None:
        raise TaskBusy("Task 7 is being answered by someone else.", hint="It is tried again by itself.")

    context.publisher = busy
    context.queue._submit_one(redis, context.queue.forms.task_push(KEY, WaitingTask(1, 7, "", "v")), None, True)
    worker = BagWorker(context, ["publish"])
    found = worker._next_job()
    assert found is not None
    with caplog.at_level(logging.INFO):
        worker.execute_job(*found)
    tasks.set_context(None)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO and "task_busy" in r.getMessage()] == []
    assert read_tallies(redis, settings).failures == {}
    (job,) = context.queue.jobs(status="queued")
    assert job.error is not None and job.error["code"] == "task_busy", "it is tried again"
    assert not BackendError.ordinary
