"""What was learnt, over HTTP: suggestions and similar slides in the panel, the curve in the overview, labels on the map."""

from __future__ import annotations

import html
import json
import re
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from learnt_project import DAMAGED, LEARNT, UNTAUGHT, Learnt, learn

from backend.jobs.queue import BagRequest
from backend.label_studio.services import Services
from backend.learning.heads import predict
from backend.web import events
from backend.web.signing import SlideSigner

# --- the panel --------------------------------------------------------------------------------------------------------


def test_the_panel_says_what_each_head_says_of_the_slide_and_how_sure_it_is(learnt: Learnt) -> None:
    suggestion = learnt.panel(25, LEARNT)["suggestion"]
    assert suggestion["model_version"] == learnt.version == f"{learnt.services.model.model_version}-h3"
    diagnosis, grade = suggestion["controls"]
    expected = predict(learnt.diagnosis, learnt.embeddings[25:26])
    assert (diagnosis["control"], diagnosis["kind"], diagnosis["value"]) == ("diagnosis", "choice", "No tumour")
    assert diagnosis["confidence"] == pytest.approx(float(expected.confidence[0]), abs=1e-9)
    assert [choice["label"] for choice in diagnosis["choices"]] == ["No tumour", "Tumour"]
    assert sum(choice["confidence"] for choice in diagnosis["choices"]) == pytest.approx(1)
    assert (diagnosis["labels"], diagnosis["calibrated"]) == (24, learnt.diagnosis.calibrated)
    assert (grade["control"], grade["kind"], grade["choices"]) == ("grade", "number", [])
    assert grade["value"] == pytest.approx(predict(learnt.grade, learnt.embeddings[25:26]).values[0])
    assert 0 < grade["confidence"] < 1 and grade["tolerance"] > 0


def listed(learnt: Learnt, state: dict[str, Any]) -> list[tuple[str, str]]:
    """What the page says that the panel leads to: the text of each slide, and where its link leads ('' without one)."""
    answer = learnt.client.get(state["similar_page"])
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    rows = re.findall(r"<li>(.*?)</li>", answer.text)
    return [(re.sub("<[^>]*>", "", row).strip(), (re.findall(r'href="([^"]*)"', row) or [""])[0]) for row in rows]


def test_the_nearest_labelled_slides_stand_on_a_page_of_their_own_with_addresses_that_open(learnt: Learnt) -> None:
    state = learnt.panel(1, LEARNT)
    similar = listed(learnt, state)
    assert len(similar) == 5
    assert all("No tumour" in text for text, _ in similar), "all of the planted kind"
    assert not any("case-01.tif" in text for text, _ in similar), "a slide is not its own neighbour"
    near = [float(text.rsplit(" ", 1)[1]) for text, _ in similar]
    assert near == sorted(near, reverse=True)
    page = str(learnt.client.base_url.join(state["similar_page"]))
    for text, link in similar:
        leads = learnt.client.get(urljoin(page, link))
        assert leads.status_code == 307
        shown = learnt.client.get(leads.headers["location"].replace("/panel?", "/panel/state?")).json()
        assert text.startswith(shown["name"]) and shown["project"] == LEARNT
    pictures = re.findall(r'src="([^"]*)"', learnt.client.get(page).text)
    assert len(pictures) == 5
    for picture in pictures:
        answer = learnt.client.get(urljoin(page, html.unescape(picture)))
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/jpeg"


def test_a_slide_with_a_thumbnail_is_shown_by_it_and_one_that_lost_its_result_by_its_name(learnt: Learnt) -> None:
    from backend.slides.reader import open_slide
    from backend.web.neighbours import Neighbours

    services, key = learnt.services, learnt.slides[3][1]
    names = [text.split(":")[0] for text, _ in listed(learnt, learnt.panel(3, LEARNT))]
    path = next(path for path, _ in learnt.slides if path.name == names[0])
    ref = services.resolver.resolve(str(path))
    with open_slide(path, services.settings) as slide:
        services.thumbnails.make(ref.identity, slide)
    other = next(key for path, key in learnt.slides if path.name == names[1])
    result = services.store.need(other)
    stored = Path(services.settings.results_location) / other[:2] / f"{other}.h5"
    stored.unlink()
    try:
        # As a backend says it that was just started, and remembers nothing.
        page = Neighbours(services, SlideSigner(services.settings.model_dir)).page(key, LEARNT, "assets")
        first, second, *_ = re.findall(r"<li>(.*?)</li>", page)
        assert 'src="../../thumbnails/' in first and "href" in first
        assert names[1] in second and "href" not in second and "src" not in second
    finally:
        services.store.put(other, result)


def test_without_heads_the_panel_says_what_is_missing(learnt: Learnt) -> None:
    state = learnt.panel(25, UNTAUGHT)
    assert "suggestion" not in state
    assert state["learning"] == [learnt.few.message]
    assert "more labelled slides" in state["learning"][0]
    assert len(listed(learnt, state)) == 2, "two are labelled"


def test_a_project_that_was_never_trained_has_a_plain_panel(learnt: Learnt) -> None:
    state = learnt.panel(25, 12345)
    assert state["result"] is not None
    assert not {"suggestion", "similar_page", "learning"} & set(state)


def test_damaged_heads_leave_the_panel_whole_and_are_told(learnt: Learnt) -> None:
    state = learnt.panel(25, DAMAGED)
    assert state["result"] is not None and "suggestion" not in state
    assert (
        "cannot be read" in state["learning"][0] and f"{learnt.services.model.model_version}-h1" in state["learning"][0]
    )
    assert len(listed(learnt, state)) == 5, "what is not damaged is shown"
    file = learnt.services.versions.snapshot_file(DAMAGED)
    kept = file.read_bytes()
    file.write_bytes(kept[: len(kept) // 2])
    try:
        state = learnt.panel(25, DAMAGED)
        assert state["result"] is not None and "similar_page" not in state and state["learning"]
    finally:
        file.write_bytes(kept)


def test_an_address_without_a_project_speaks_for_the_one_that_learnt_last(learnt: Learnt) -> None:
    assert learnt.panel(25, None)["learning"] == learnt.panel(25, DAMAGED)["learning"]
    leads = learnt.client.get(f"/slides/{learnt.slides[25][1]}?project={LEARNT}")
    state = learnt.client.get(leads.headers["location"].replace("/panel?", "/panel/state?")).json()
    assert state["suggestion"]["model_version"] == learnt.version


# --- the overview -----------------------------------------------------------------------------------------------------


def test_the_learning_curve_is_that_of_the_stored_versions(learnt: Learnt) -> None:
    project = learnt.project(LEARNT)
    assert project["version"] == learnt.version
    points = [point for point in project["curve"] if point["control"] == "diagnosis"]
    assert [point["labelled"] for point in points] == [12, 18, 24]
    assert [point["model_version"][-3:] for point in points] == ["-h1", "-h2", "-h3"]
    score, low, high = learnt.diagnosis.metrics["balanced_accuracy"]
    assert (points[-1]["metric"], points[-1]["score"], points[-1]["low"], points[-1]["high"]) == (
        "balanced_accuracy",
        score,
        low,
        high,
    )
    assert points[-1]["chance"] == 0.5
    (grade,) = [point for point in project["curve"] if point["control"] == "grade"]
    assert (grade["metric"], grade["score"]) == ("r2", learnt.grade.metrics["r2"][0])
    heads = {head["control"]: head for head in project["heads"]}
    assert heads["diagnosis"]["labels"] == 24 and heads["diagnosis"]["score"] == score
    assert heads["grade"]["mae"] == learnt.grade.metrics["mae"][0]
    assert project["training"] is None and project["learning_problem"] == ""


def test_a_new_version_is_on_the_curve_at_once(learnt: Learnt) -> None:
    registry = learnt.services.versions.registry
    before = learnt.project(LEARNT)["curve"]
    registry.add(LEARNT, [learnt.diagnosis], model_version=learnt.services.model.model_version)
    try:
        assert len(learnt.project(LEARNT)["curve"]) == len(before) + 1
    finally:
        registry.restore(LEARNT, learnt.version)
        shutil.rmtree(learnt.services.settings.model_dir / "heads" / str(LEARNT) / "h0004")
    assert learnt.project(LEARNT)["version"] == learnt.version


def test_a_project_without_heads_says_what_it_needs(learnt: Learnt) -> None:
    project = learnt.project(UNTAUGHT)
    assert (project["heads"], project["curve"]) == ([], [])
    assert project["too_few"] == [learnt.few.message]
    assert project["version"] == learnt.services.model.model_version


def test_damaged_heads_are_said_and_the_other_projects_are_shown(learnt: Learnt) -> None:
    project = learnt.project(DAMAGED)
    assert "cannot be read" in project["learning_problem"] and project["heads"] == []
    pointer = learnt.services.settings.model_dir / "heads" / str(DAMAGED) / "current.json"
    kept = pointer.read_bytes()
    pointer.write_bytes(b"{")
    try:
        project = learnt.project(DAMAGED)
        assert "current.json" in project["learning_problem"] and project["curve"] == []
        assert learnt.project(LEARNT)["curve"]
    finally:
        pointer.write_bytes(kept)


def test_where_the_training_stands_is_told(learnt: Learnt) -> None:
    training, redis = learnt.services.training, learnt.services.redis
    try:
        assert training.note_annotations(LEARNT) == "scheduled"
        assert learnt.project(LEARNT)["training"]["status"] == "scheduled"
        assert training.train_now(LEARNT) == "queued"
        assert learnt.project(LEARNT)["training"]["status"] == "queued"
        error = {"code": "label_studio_unreachable", "message": "Label Studio does not answer.", "hint": ""}
        redis.hset(f"rq:job:train-{LEARNT}", mapping={"status": "failed", "meta": json.dumps({"error": error})})
        told = learnt.project(LEARNT)["training"]
        assert (told["status"], told["reason"]) == ("failed", "Label Studio does not answer.")
    finally:
        redis.flushall()


# --- the map ----------------------------------------------------------------------------------------------------------


def test_the_map_tells_labels_from_suggestions_and_notices_new_ones(learnt: Learnt) -> None:
    by_key = {point["key"]: point for point in learnt.client.get("/api/map").json()["points"]}
    for number, (_, key) in enumerate(learnt.slides):
        point = by_key[key]
        assert point["label"] == ("Tumour", "No tumour")[number % 2]
        assert point["suggested"] == (number >= 24)
        assert 0.5 <= point["confidence"] <= 1
    last = by_key[learnt.slides[29][1]]
    assert last["url"].endswith(f"?project={last['project']}")

    relabelled = [*learnt.labels, *["Unsure"] * 6]
    kept = {p: learnt.services.versions.snapshot_file(p).read_bytes() for p in (LEARNT, UNTAUGHT, DAMAGED)}
    learn(learnt.services, UNTAUGHT, learnt.slides, relabelled, [])
    try:
        after = {point["key"]: point for point in learnt.client.get("/api/map").json()["points"]}
        point = after[learnt.slides[29][1]]
        assert (point["label"], point["suggested"], point["confidence"]) == ("Unsure", False, None)
        assert (point["x"], point["y"]) == (last["x"], last["y"])
    finally:
        for project, data in kept.items():
            learnt.services.versions.snapshot_file(project).write_bytes(data)


# --- many panels ------------------------------------------------------------------------------------------------------


def test_fifty_panels_share_one_look_at_redis_and_ask_for_nothing_while_they_watch(
    learnt: Learnt, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, watchers = learnt.services, 50
    paths = [path for path, _ in learnt.slides[:5]]
    for number, path in enumerate(paths):  # not analysed, so that there is something to wait for
        path.with_name(f"new-{number}.tif").hardlink_to(path)
    refs = [services.resolver.resolve(str(path.with_name(f"new-{n}.tif"))) for n, path in enumerate(paths)]
    keys = [services.key(ref) for ref in refs]
    looks: list[list[str]] = []
    real = events.read_statuses

    def counted(services: Services, asked: Iterable[str], *more: Any) -> Any:
        looks.append(list(asked))
        return real(services, looks[-1], *more)

    monkeypatch.setattr(events, "read_statuses", counted)
    signer = SlideSigner(services.settings.model_dir)
    ready = threading.Barrier(watchers + 1, timeout=60)
    told: list[str] = []

    def watch(number: int) -> None:
        url = f"{str(learnt.client.base_url).rstrip('/')}/panel/events"
        params = {"slide": signer.token(refs[number % 5], LEARNT)}
        first = True
        with httpx.stream("GET", url, params=params, timeout=60, trust_env=False) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and '"phase"' in line:
                    phase = json.loads(line[6:])["phase"]
                    if phase == "queued":
                        told.append(phase)
                        return
                    if first:
                        first = False
                        ready.wait()

    before = requests_of(learnt.client)
    started = time.monotonic()
    threads = [threading.Thread(target=watch, args=(number,)) for number in range(watchers)]
    for thread in threads:
        thread.start()
    ready.wait()
    for ref, key in zip(refs, keys, strict=True):
        services.queue.submit(BagRequest(key, ref.to_json()), priority="batch")
    for thread in threads:
        thread.join(60)
    assert told == ["queued"] * watchers
    # The look sleeps between two rounds: however slow the machine, more looks than seconds mean more than one poll.
    assert len(looks) <= (time.monotonic() - started) / events.LOOK_EVERY_S + 2
    assert all(len(asked) == len(set(asked)) <= 5 for asked in looks)
    after = requests_of(learnt.client)
    services.redis.flushall()
    grown = {path: after[path] - before.get(path, 0) for path in after if path.startswith("/panel")}
    assert {path: count for path, count in grown.items() if count} == {"/panel/events": watchers}


def requests_of(client: httpx.Client) -> dict[str, int]:
    """How many requests each route has had, by the backend's own metrics."""
    counts: dict[str, int] = {}
    for line in client.get("/metrics").text.splitlines():
        if "requests_total{" in line:
            labels, value = line.rsplit(" ", 1)
            route = labels.split('route="')[1].split('"')[0]
            counts[route] = counts.get(route, 0) + int(float(value))
    return counts
