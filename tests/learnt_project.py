"""A project that has learnt: stored results with planted embeddings, heads fitted and stored by the real functions, a snapshot."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
from web_client import served, store_result

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.learning.acquisition import choice_like, labelling_order
from backend.learning.heads import Float32Array, Head, predict
from backend.learning.snapshot import ProjectSnapshot, words, write_snapshot
from backend.learning.training import TooFewLabels, fit_choice_head, fit_number_head
from backend.results.bag import SLIDE_REF
from backend.web.signing import SlideSigner

CLASSES = ("Tumour", "No tumour", "Unsure")


SLIDES = 30
LEARNT, UNTAUGHT, DAMAGED = 7, 8, 9


def planted_embeddings(n: int, kinds: int = 2, apart: float = 6.0) -> Float32Array:
    """float32 (n, 768) of ``kinds`` planted kinds in turn."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(kinds, 768))
    centres *= apart / np.linalg.norm(centres, axis=1, keepdims=True)
    return (centres[np.arange(n) % kinds] + 0.35 * rng.normal(size=(n, 768))).astype(np.float32)


def store_slides(services: Services, slide: Path, count: int) -> list[tuple[Path, str]]:
    """Results for ``count`` copies (links) of a slide, with :func:`planted_embeddings`; their paths and bag keys."""
    root = services.settings.slide_roots[0]
    paths = [root / f"case-{i:02}.tif" for i in range(count)]
    for path in paths:
        path.hardlink_to(slide)
    made = services.store.need(store_result(services, paths[0]))
    stored = []
    for path, embedding in zip(paths, planted_embeddings(count), strict=True):
        ref = services.resolver.resolve(str(path))
        provenance = {**made.provenance, "slide": path.name, SLIDE_REF: json.dumps(ref.to_json())}
        key = services.key(ref)
        services.store.put(key, replace(made, slide_embedding=embedding, provenance=provenance))
        stored.append((path, key))
    return stored


def fit_diagnosis(services: Services, embeddings: Float32Array, labels: Sequence[str]) -> Head | TooFewLabels:
    """The head that the first labels make."""
    x = embeddings[: len(labels)]
    fingerprint = services.model.fingerprint
    return fit_choice_head("diagnosis", CLASSES, x, list(labels), fingerprint=fingerprint, background=embeddings)


def fit_grade(services: Services, embeddings: Float32Array, count: int) -> Head:
    """A head for a number that one planted direction holds."""
    numbers = np.round(3 + embeddings[:count, :40].sum(axis=1), 1).tolist()
    head = fit_number_head("grade", embeddings[:count], numbers, fingerprint=services.model.fingerprint)
    assert isinstance(head, Head)
    return head


def learn(
    services: Services,
    project: int,
    slides: Sequence[tuple[Path, str]],
    labels: Sequence[str],
    heads: Sequence[Head],
    too_few: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Put ``heads`` in use, and write what training would know of the slides, the first of which have ``labels``. Returns the version."""
    embeddings = planted_embeddings(len(slides))
    version = services.model.model_version
    if heads:
        version = services.versions.registry.add(project, heads, model_version=version).version
    output = predict(heads[0], embeddings) if heads else None
    labelled = np.arange(len(labels))
    order = labelling_order(
        embeddings, np.arange(len(slides)) < len(labels), choice_like(heads[0], output) if output else None
    )
    snapshot = ProjectSnapshot(
        about={
            "version": version,
            "fingerprint": services.model.fingerprint,
            "created_at": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "heads": [{"control": head.control, "level": head.level, "kind": head.kind} for head in heads],
            "too_few": list(too_few),
            "issues": [],
            "unanalysed": 0,
        },
        tasks=np.arange(1, len(slides) + 1, dtype=np.int64),
        keys=tuple(key for _, key in slides),
        names=tuple(path.name for path, _ in slides),
        labels=tuple({"diagnosis": labels[i]} if i < len(labels) else {} for i in range(len(slides))),
        suggestions=tuple(words(value) for value in output.values) if output else ("",) * len(slides),
        confidence=output.confidence if output else np.full(len(slides), np.nan),
        priority=order.priority,
        novelty=order.novelty,
        cluster=order.cluster,
        labelled=labelled,
        embeddings=embeddings[labelled],
    )
    write_snapshot(snapshot, services.versions.snapshot_file(project))
    return version


@contextmanager
def projects_of_label_studio() -> Iterator[tuple[str, list[str]]]:
    """The address of a server that lists projects as Label Studio does and knows nothing else, and a list for their model version."""
    versions: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            numbers = (LEARNT, UNTAUGHT, DAMAGED)
            about = {"task_number": SLIDES, "num_tasks_with_annotations": 24, "total_predictions_number": SLIDES}
            found = [{"id": n, "title": f"Project {n}", "model_version": versions[-1], **about} for n in numbers]
            body = json.dumps({"count": len(found), "next": None, "previous": None, "results": found}).encode()
            page = parse_qs(urlsplit(self.path).query).get("page", ["1"])
            first = self.path.startswith("/api/projects") and page == ["1"]
            self.send_response(200 if first else 404)  # there is no second page
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", versions
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


class Learnt:
    """A served backend whose project ``LEARNT`` has three versions of heads over ``SLIDES`` slides, most of them labelled."""

    def __init__(self, client: httpx.Client, services: Services, slide: Path) -> None:
        self.client, self.services = client, services
        self.slides = store_slides(services, slide, SLIDES)
        self.embeddings = planted_embeddings(SLIDES)
        self.labels = [("Tumour", "No tumour")[i % 2] for i in range(24)]
        fits = [fit_diagnosis(services, self.embeddings, self.labels[:n]) for n in (12, 18, 24)]
        heads = [head for head in fits if isinstance(head, Head)]
        assert len(heads) == len(fits)
        self.diagnosis = heads[-1]
        self.grade = fit_grade(services, self.embeddings, 24)
        for head in heads[:-1]:
            services.versions.registry.add(LEARNT, [head], model_version=services.model.model_version)
        self.version = learn(services, LEARNT, self.slides, self.labels, [self.diagnosis, self.grade])

        few = fit_diagnosis(services, self.embeddings, self.labels[:2])
        assert isinstance(few, TooFewLabels)
        self.few = few
        learn(services, UNTAUGHT, self.slides, self.labels[:2], [], [few.as_dict()])
        learn(services, DAMAGED, self.slides, self.labels, [self.diagnosis])
        (services.settings.model_dir / "heads" / str(DAMAGED) / "h0001" / "arrays.safetensors").write_bytes(b"broken")

    def panel(self, number: int, project: int | None) -> dict[str, Any]:
        """The JSON of a slide's panel, opened for a project."""
        ref = self.services.resolver.resolve(str(self.slides[number][0]))
        token = SlideSigner(self.services.settings.model_dir).token(ref, project)
        answer = self.client.get("/panel/state", params={"slide": token})
        assert answer.status_code == 200, answer.text
        state: dict[str, Any] = answer.json()
        return state

    def project(self, number: int) -> dict[str, Any]:
        """A project in the overview."""
        answer = self.client.get("/api/projects").json()
        return next(project for project in answer["projects"] if project["id"] == number)


@contextmanager
def learnt_backend(folder: Path, redis: EmbeddedRedis, stand_in: Path, slide: Path) -> Iterator[Learnt]:
    """A :class:`Learnt` over links to ``slide``, which lies beside ``folder``."""
    with projects_of_label_studio() as (studio, versions):
        options = {"label_studio_url": studio, "label_studio_api_key": "x" * 40}
        with served(folder, redis, stand_in, **options) as (client, services):
            versions.append(f"{services.model.model_version}-h3")
            yield Learnt(client, services, slide)
