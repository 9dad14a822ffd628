"""Bad slides through the whole backend (HTTP, Redis, a real worker with the stand-in model): what the user is told."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from slides.slide_makers import glass, scribble, stroma, write
from web_client import predict_body, served, task

from backend.jobs.pool import WorkerPool
from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, stand_in: Path) -> Iterator[tuple[httpx.Client, Services, Path]]:
    folder = tmp_path_factory.mktemp("bad-slides")
    with (
        EmbeddedRedis(folder / "redis-home") as redis,
        served(folder, redis, stand_in, predict_wait_s=60, devices="cpu", image_max_pixels=30_000_000) as (
            client,
            services,
        ),
    ):
        pool = WorkerPool(services.settings)
        pool.start()
        yield client, services, folder / "slides"
        pool.stop()


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is huge, and compresses to almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 100_000))
        + chunk(b"IEND", b"")
    )


def truncated(path: Path) -> None:
    write(path, stroma(1200, 1200))
    path.write_bytes(path.read_bytes()[:5000])


def half_written(path: Path) -> None:
    """The directory of a classic TIFF lies at its end or between: cut behind the first levels' data."""
    write(path, stroma(1500, 1500))
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


Maker = Callable[[Path], object]

BAD: list[tuple[str, Maker, dict[str, Any], str, str]] = [
    ("cut.svs", truncated, {}, "slide_unreadable", "cut.svs"),
    ("half.tif", half_written, {}, "slide_unreadable", "half.tif"),
    ("empty.svs", lambda p: p.write_bytes(b""), {}, "slide_unreadable", "empty"),
    ("empty.png", lambda p: p.write_bytes(b""), {}, "slide_unreadable", "empty"),
    ("text.tif", lambda p: p.write_text("hello"), {}, "slide_unreadable", "text.tif"),
    (
        "bomb.png",
        lambda p: p.write_bytes(png_header(60_000, 60_000)),
        {"mpp": 0.5},
        "slide_too_large",
        "IMAGE_MAX_PIXELS",
    ),
    ("one.png", lambda p: Image.new("RGB", (1, 1)).save(p), {"mpp": 0.5}, "slide_too_small", "1"),
    ("small.png", lambda p: Image.fromarray(stroma(150, 150)).save(p), {"mpp": 0.5}, "slide_too_small", "tile"),
    ("blank.tif", lambda p: write(p, glass(1500, 1500)), {}, "no_tissue", "tissue"),
    (
        "pen.tif",
        lambda p: write(p, scribble(glass(1500, 1500), (30, 40, 160), thickness=120)),
        {},
        "no_tissue",
        "tissue",
    ),
    ("no-mpp.tif", lambda p: write(p, stroma(900, 900), mpp=None), {}, "mpp_unknown", "DEFAULT_MPP"),
    ("mpp-0.tif", lambda p: write(p, stroma(900, 900), mpp=None), {"mpp": 0}, "mpp_unknown", "mpp"),
    ("mpp-huge.tif", lambda p: write(p, stroma(900, 900), mpp=None), {"mpp": 1e6}, "mpp_unknown", "mpp"),
]


@pytest.mark.parametrize(("name", "make", "data", "code", "words"), BAD, ids=[case[0] for case in BAD])
def test_opening_the_task_says_what_is_wrong_with_the_slide(
    backend: tuple[httpx.Client, Services, Path], name: str, make: Maker, data: dict[str, Any], code: str, words: str
) -> None:
    client, services, slides = backend
    make(slides / name)
    answer = client.post("/predict", json=predict_body(task(1, slide=str(slides / name), image="x.png", **data)))
    assert answer.status_code == 422, answer.text
    assert words in answer.json()["detail"]
    failed = [job for job in services.queue.jobs(100, "failed") if words in str(job.error)]
    if failed:  # what the job list shows; a bad `mpp` in the task is refused before there is a job
        assert failed[0].error is not None
        assert failed[0].error["code"] == code
        assert failed[0].error["retryable"] is False
    else:
        assert answer.json()["error"]["code"] == code


def test_a_failed_slide_is_not_tried_again_when_it_is_opened_again(
    backend: tuple[httpx.Client, Services, Path],
) -> None:
    client, services, slides = backend
    write(slides / "again.tif", glass(1500, 1500))
    body = predict_body(task(2, slide=str(slides / "again.tif"), image="x.png"))
    assert client.post("/predict", json=body).status_code == 422
    ended = {job.key: job.ended_at for job in services.queue.jobs(100, "failed")}
    assert client.post("/predict", json=body).status_code == 422
    assert {job.key: job.ended_at for job in services.queue.jobs(100, "failed")} == ended


def test_one_bad_slide_does_not_keep_the_others_from_their_answer(
    backend: tuple[httpx.Client, Services, Path],
) -> None:
    client, services, slides = backend
    good = write(slides / "good.tif", stroma(900, 900))
    bad = write(slides / "bad.tif", glass(900, 900))
    picture = slides / "picture.png"
    Image.new("RGB", (300, 300)).save(picture)
    tasks = [task(n, slide=str(path), image=str(picture)) for n, path in enumerate((bad, good, slides / "absent"), 10)]
    single = client.post("/predict", json=predict_body(tasks[1]))
    assert single.json()["results"][0]["result"]
    assert client.post("/predict", json=predict_body(tasks[0])).status_code == 422
    services.queue.release_claim(7, 11, services.model.model_version)
    results = client.post("/predict", json=predict_body(*tasks)).json()["results"]
    assert [bool(result) for result in results] == [False, True, False]


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L", "I;16"])
def test_images_of_every_kind_are_analysed(backend: tuple[httpx.Client, Services, Path], mode: str) -> None:
    client, _, slides = backend
    path = slides / f"{mode.replace(';', '')}.tif"
    rgb = Image.fromarray(stroma(700, 700))
    if mode == "I;16":
        Image.fromarray(np.asarray(rgb.convert("L")).astype(np.uint16) * 257).save(path)
    else:
        rgb.convert(mode).save(path)
    answer = client.post("/predict", json=predict_body(task(20 + len(mode) + ord(mode[0]), image=str(path), mpp=0.5)))
    if mode in ("L", "I;16"):  # grey has no stain: said aloud rather than guessed
        assert (answer.status_code, "tissue" in answer.text) == (422, True) or answer.status_code == 200
    else:
        assert answer.status_code == 200, answer.text
        assert answer.json()["results"][0]["result"]
