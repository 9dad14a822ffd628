"""The protocol over real HTTP and a real Redis: what Label Studio gets for good and for bad questions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from web_client import CONFIG, predict_body, served, store_result, task

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.slides.synthetic import SyntheticSlide


@pytest.fixture
def backend(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> Iterator[tuple[httpx.Client, Services]]:
    with served(tmp_path, embedded_redis, stand_in) as both:
        yield both


@pytest.fixture
def slide(backend: tuple[httpx.Client, Services], synthetic_slide: SyntheticSlide) -> Path:
    """A slide below SLIDE_ROOTS (a hard link: a symbolic one would lead out of the roots)."""
    (root,) = backend[1].settings.slide_roots
    os.link(synthetic_slide.path, root / "slide.tif")
    return root / "slide.tif"


@pytest.fixture
def picture(backend: tuple[httpx.Client, Services]) -> Path:
    (root,) = backend[1].settings.slide_roots
    Image.new("RGB", (600, 400), "white").save(root / "picture.png")
    return root / "picture.png"


def test_health_and_setup_state_the_model_version(backend) -> None:
    client, services = backend
    assert client.get("/health").json()["status"] == "UP"
    answer = client.post(
        "/setup",
        json={"project": "1.2", "schema": CONFIG, "hostname": "http://ls", "access_token": "x", "extra_params": None},
    )
    assert answer.status_code == 200
    assert answer.json()["model_version"] == services.model.model_version
    assert client.get("/versions").json() == {"versions": [services.model.model_version]}


def test_a_config_with_nothing_for_us_is_told_what_to_add(backend) -> None:
    client, _ = backend
    config = '<View><Text name="t" value="$t"/><Choices name="c" toName="t"><Choice value="a"/></Choices></View>'
    for path, body in (("/setup", {"schema": config}), ("/predict", predict_body(task(1, t="x"), config=config))):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        assert "<Image" in answer.json()["detail"]
        assert "BrushLabels" in answer.json()["detail"]


def test_a_stored_slide_is_answered_and_an_unfinished_one_is_left_out(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    store_result(services, slide)
    other = slide.with_name("other.tif")
    os.link(slide, other)
    os.utime(slide)  # hard links share times: whatever both had as identity was computed before
    key = store_result(services, slide)
    body = predict_body(task(1, slide="absent.tif", image=str(picture)), task(2, slide=str(slide), image=str(picture)))
    results = client.post("/predict", json=body).json()["results"]
    assert results[0] == []
    assert results[1]["model_version"] == services.model.model_version
    assert "score" not in results[1]
    kinds = [region["type"] for region in results[1]["result"]]
    assert kinds.count("brushlabels") == 1
    assert "textarea" in kinds
    brush = next(region for region in results[1]["result"] if region["type"] == "brushlabels")
    assert (brush["original_width"], brush["original_height"]) == (600, 400)  # the picture's size, not the slide's
    assert services.store.has(key)


def test_an_unfinished_slide_is_queued_once_for_any_number_of_tasks(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    body = predict_body(*(task(number, slide=str(slide), image=str(picture)) for number in range(1, 11)))
    answer = client.post("/predict", json=body)
    assert answer.json()["results"] == [[]] * 10
    assert services.queue.depths()["batch"] == 1
    single = client.post("/predict", json=predict_body(task(1, slide=str(slide), image=str(picture))))
    assert single.json()["results"] == [[]]
    assert services.queue.depths() == {"interactive": 1, "batch": 0, "publish": 0, "train": 0}
    (job,) = services.queue.jobs()
    assert len(services.queue.waiting(job.key)) == 10


def test_of_three_openers_at_once_one_gets_the_prediction(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    store_result(services, slide)
    body = predict_body(task(5, slide=str(slide), image=str(picture)))
    results: list[Any] = []
    openers = [
        threading.Thread(target=lambda: results.append(client.post("/predict", json=body).json()["results"][0]))
        for _ in range(3)
    ]
    for opener in openers:
        opener.start()
    for opener in openers:
        opener.join()
    assert sorted(bool(result) for result in results) == [False, False, True]


def test_a_smart_rectangle_gets_only_what_lies_inside_it(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    store_result(services, slide)
    box = {"type": "rectanglelabels", "value": {"x": 20.0, "y": 20.0, "width": 40.0, "height": 40.0, "rotation": 0}}
    body = predict_body(task(5, slide=str(slide), image=str(picture)), context={"result": [box]})
    for _ in range(2):  # a tool is used again and again: no claim stands in its way
        (answer,) = client.post("/predict", json=body).json()["results"]
        rectangles = [r["value"] for r in answer["result"] if r["type"] == "rectanglelabels"]
        assert rectangles
        for value in rectangles:
            assert 20 <= value["x"] + value["width"] / 2 <= 60
            assert 20 <= value["y"] + value["height"] / 2 <= 60


def test_the_embedding_and_the_heatmap_are_served(backend, slide: Path) -> None:
    client, services = backend
    key = store_result(services, slide)
    embedding = client.get(f"/api/bags/{key}/embedding").json()
    assert len(embedding["embedding"]) == 768
    assert embedding["model_version"] == services.model.model_version
    heatmap = client.get(f"/api/bags/{key}/heatmap.png")
    assert heatmap.headers["content-type"] == "image/png"
    assert (
        client.get(f"/api/bags/{key}/heatmap.png", headers={"If-None-Match": heatmap.headers["etag"]}).status_code
        == 304
    )
    assert client.get(f"/api/bags/{key}/heatmap.png?head=8").status_code == 404
    assert client.get(f"/api/bags/{key}").json()["result"]["tiles"] > 0
    assert client.get(f"/api/bags/{'0' * 40}/embedding").status_code == 404
    assert client.get("/api/bags/..%2f..%2fetc/embedding").status_code == 404


def test_thumbnails_can_be_drawn_by_another_origin(backend, slide: Path) -> None:
    from backend.slides.reader import open_slide

    client, services = backend
    with open_slide(slide, services.settings) as opened:
        thumbnail = services.thumbnails.make("x", opened)
    answer = client.get(f"/thumbnails/{thumbnail.id}.jpg", headers={"Origin": "http://labelstudio.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-frame-options" not in answer.headers
    assert (
        "access-control-allow-origin" not in client.get("/api/jobs", headers={"Origin": "http://evil.example"}).headers
    )
    assert max(thumbnail.width, thumbnail.height) <= 2000
    assert client.get(f"/thumbnails/{'0' * 40}.jpg").status_code == 404


# --- bad questions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        ({"slide": "ROOT/absent.svs"}, 404, "absent.svs"),
        ({"slide": "/etc/passwd"}, 403, "SLIDE_ROOTS"),
        ({"slide": "ROOT/../../../etc/passwd"}, 403, "SLIDE_ROOTS"),
        ({"slide": "http://169.254.169.254/latest"}, 403, "ALLOWED_HOSTS"),
        ({"slide": "s3://bucket/slide.svs"}, 403, "REMOTE_STORES"),
        ({"other": "x"}, 400, "no field 'image'"),
        ({"slide": 7}, 400, "no location"),
        ({"slide": "ROOT/slide.tif", "mpp": "big"}, 422, "mpp"),
    ],
)
def test_opening_a_task_whose_slide_cannot_be_had_says_why(
    backend, slide: Path, data: dict[str, Any], status: int, words: str
) -> None:
    client, services = backend
    root = str(services.settings.slide_roots[0])
    data = {name: value.replace("ROOT", root) if isinstance(value, str) else value for name, value in data.items()}
    answer = client.post("/predict", json=predict_body(task(1, **data)))
    assert answer.status_code == status, answer.text
    assert words in answer.json()["detail"]
    assert answer.json()["error"]["hint"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{not json", "JSON"),
        (b"[]", "body"),
        (b"{}", "tasks"),
        (b'{"tasks": 3}', "tasks"),
        (b'{"tasks": [1]}', "tasks"),
        (b'{"tasks": [{"id": 1}], "label_config": "<View/>"}', "<Image"),
        (b'{"tasks": [], "params": {"context": "abc"}}', "context"),
        (b'{"tasks": [], "params": {"context": [1]}}', "context"),
    ],
)
def test_a_malformed_body_is_400_and_says_where(backend, body: bytes, words: str) -> None:
    answer = backend[0].post("/predict", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["detail"]


def test_an_odd_task_costs_the_others_nothing(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    store_result(services, slide)
    good = task(9, slide=str(slide), image=str(picture))
    for number, odd in enumerate(
        ({"mpp": 10**400}, {"slide": "\ud800"}, {"slide": "a\0b"}, {"mpp": True}, {"slide": []}), 1
    ):
        body = predict_body(task(number, **{"slide": str(slide), "image": str(picture), **odd}), good)
        body["project"] = "²"  # no number; the tasks' own project counts
        answer = client.post("/predict", content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert answer.status_code == 200, answer.text
        assert [bool(result) for result in answer.json()["results"]] == [False, True]
        services.queue.release_claim(7, 9, services.model.model_version)
        alone = client.post("/predict", content=json.dumps({**body, "tasks": body["tasks"][:1]}))
        assert alone.status_code in (400, 403, 404, 422), alone.text


def test_asking_again_while_someone_is_being_answered_ends_in_a_push(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    key = store_result(services, slide)
    body = predict_body(task(5, slide=str(slide), image=str(picture)))
    assert client.post("/predict", json=body).json()["results"][0]
    assert client.post("/predict", json=body).json()["results"] == [[]]
    assert [waiting.task for waiting in services.queue.waiting(key)] == [5]


def test_a_thousand_stored_tasks_are_answered_in_part_and_pushed_for_the_rest(
    backend, slide: Path, picture: Path
) -> None:
    client, services = backend
    key = store_result(services, slide)
    tasks = [task(number, slide=str(slide), image=str(picture)) for number in range(1, 1001)]
    results = client.post("/predict", json=predict_body(*tasks)).json()["results"]
    given = [number for number, result in enumerate(results, 1) if result]
    assert 0 < len(given) <= 500
    assert sorted([waiting.task for waiting in services.queue.waiting(key)] + given) == list(range(1, 1001))


def test_a_body_over_the_limit_is_413(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(tmp_path, embedded_redis, stand_in, max_body_bytes=2000) as (client, _):
        assert client.post("/predict", content=b" " * 3000).status_code == 413
        chunks = (b" " * 500 for _ in range(10))  # without a Content-Length
        assert client.post("/predict", content=chunks).status_code == 413


def test_ten_thousand_tasks_in_one_call_are_all_queued(backend, slide: Path, picture: Path) -> None:
    client, services = backend
    (root,) = services.settings.slide_roots
    tasks = []
    for number in range(10_000):
        name = root / f"{number}.tif"
        name.write_bytes(b"%d" % number)
        tasks.append(task(number + 1, slide=str(name), image=str(picture)))
    answer = client.post("/predict", json=predict_body(*tasks))
    assert answer.json()["results"] == [[]] * 10_000
    assert services.queue.depths()["batch"] == 10_000


def test_basic_authentication_is_asked_for_where_it_is_set(
    tmp_path: Path, embedded_redis: EmbeddedRedis, redis: Any, stand_in: Path
) -> None:
    with served(
        tmp_path, embedded_redis, stand_in, basic_auth_user="ls", basic_auth_pass="pässword", webhook_secret="hush"
    ) as (client, _):
        assert client.get("/health").status_code == 401
        assert client.get("/health", auth=("ls", "wrong")).status_code == 401
        assert client.get("/health", auth=("ls", "pässword")).status_code == 200
        event = {"action": "ANNOTATION_CREATED", "project": {"id": 1}}
        assert client.post("/webhook", json=event).status_code == 401
        assert client.post("/webhook", json=event, headers={"X-WSC-Webhook-Secret": "hush"}).status_code == 200


def test_without_redis_the_answer_is_503_with_what_to_do(tmp_path: Path, stand_in: Path, slide_file: Path) -> None:
    server = EmbeddedRedis(tmp_path / "redis")
    with served(tmp_path, server, stand_in) as (client, services):
        (root,) = services.settings.slide_roots
        os.link(slide_file, root / "slide.tif")
        body = predict_body(task(1, slide=str(root / "slide.tif"), image=str(root / "slide.tif")))
        assert client.post("/predict", json=body).status_code == 200
        server.stop()
        answer = client.post("/predict", json=body)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "queue_unavailable"
        assert client.get("/health").status_code == 200
        assert "wsc_redis_up 0.0" in client.get("/metrics").text


@pytest.fixture
def slide_file(synthetic_slide: SyntheticSlide) -> Path:
    return synthetic_slide.path


def test_metrics_count_requests_and_queues(backend) -> None:
    client, _ = backend
    client.get("/health")
    text = client.get("/metrics").text
    assert 'wsc_http_requests_total{route="/health",status="200"}' in text
    assert 'wsc_queue_depth{queue="batch"} 0.0' in text


def test_the_http_process_loads_neither_torch_nor_mmm() -> None:
    code = (
        "import sys, backend.web.app, backend.web.server, backend.jobs.pool, backend.commands.import_slides\n"
        "print(sorted({'torch', 'mmm', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
