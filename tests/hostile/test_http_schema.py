"""Requests made from our own OpenAPI description, right and wrong, over real HTTP: none is a server error, every refusal says why."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from reliability_report import record
from schemathesis import GenerationMode
from web_client import served, store_result

from backend.jobs.redis_server import EmbeddedRedis
from backend.label_studio.services import Services
from backend.slides.synthetic import SyntheticSlide
from backend.web.signing import SlideSigner

# 5xx that are answers: another machine does not answer, or a part is not installed.
DOCUMENTED_5XX = {502, 503}
EXAMPLES = 25


@dataclass
class Backend:
    client: httpx.Client
    services: Services
    key: str
    token: str
    schema: dict[str, Any]

    def alive(self) -> bool:
        return self.client.get("/health").status_code == 200


@pytest.fixture(scope="module")
def backend(
    tmp_path_factory: pytest.TempPathFactory, stand_in: Path, synthetic_slide: SyntheticSlide
) -> Iterator[Backend]:
    folder = tmp_path_factory.mktemp("http-schema")
    with (
        EmbeddedRedis(folder / "redis-home") as redis,
        served(folder, redis, stand_in, predict_wait_s=0, predict_batch_budget_s=0.5, max_body_bytes=1_000_000) as (
            client,
            services,
        ),
    ):
        (root,) = services.settings.slide_roots
        slide = root / "slide.tif"
        shutil.copy(synthetic_slide.path, slide)
        key = store_result(services, slide)
        token = SlideSigner(services.settings.model_dir).token(services.resolver.resolve(str(slide)), project=7)
        yield Backend(client, services, key, token, client.get("/openapi.json").json())


# --- by our own description ---------------------------------------------------------------------------------------


def test_no_request_that_the_description_allows_or_forbids_is_a_server_error(backend: Backend) -> None:
    """Schemathesis makes requests from the OpenAPI description: right ones, and ones that break it in every way it knows.

    Where a route needs a signature or a key, every other request gets a real one: else nothing behind it would be reached.
    """
    answers: dict[str, Counter[int]] = {}
    for found in schemathesis.openapi.from_dict(backend.schema).get_all_operations():
        operation = found.ok()
        answers[operation.label] = _requests(operation, GenerationMode.POSITIVE, backend)
        if operation.body or list(operation.iter_parameters()):  # what asks for nothing cannot be asked wrongly
            answers[operation.label] += _requests(operation, GenerationMode.NEGATIVE, backend)
    assert backend.alive()
    statuses = sum(answers.values(), Counter())
    record(
        "http",
        "requests from the OpenAPI description",
        operations=len(answers),
        examples=sum(statuses.values()),
        answered_2xx_3xx=sum(n for status, n in statuses.items() if status < 400),
        refused_4xx=sum(n for status, n in statuses.items() if 400 <= status < 500),
        server_errors_5xx=sum(n for status, n in statuses.items() if status >= 500),
    )
    reached = {label for label, counts in answers.items() if any(status < 400 for status in counts)}
    # Not all are: no generator finds a labelling config, or a thumbnail's name. Those are reached in test_http_bodies and tests/web.
    assert len(reached) > len(answers) / 2, {label: dict(counts) for label, counts in answers.items()}


def _requests(operation: schemathesis.APIOperation, mode: GenerationMode, backend: Backend) -> Counter[int]:
    """The statuses of :data:`EXAMPLES` requests. A server error fails the test, and so does a refusal that does not say why."""
    statuses: Counter[int] = Counter()

    @hypothesis_settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=st.booleans())
    def tried(case: schemathesis.Case, real: bool) -> None:
        if real:
            _open_the_door(case, backend)
        response = case.call(base_url=str(backend.client.base_url), timeout=30, allow_redirects=False)
        statuses[response.status_code] += 1
        what = f"{response.status_code} to {case.as_curl_command()}: {response.content[:300]!r}"
        assert response.status_code < 500 or response.status_code in DOCUMENTED_5XX, what
        if response.status_code >= 400 and case.path != "/panel":  # which answers people, with a page
            assert response.json()["detail"], what

    # Some parameters take any text: there is no wrong one.
    with contextlib.suppress(Unsatisfiable):
        tried()
    return statuses


def _open_the_door(case: schemathesis.Case, backend: Backend) -> None:
    """Put what is right where only something secret or known is accepted; the rest of the request stays as it was made."""
    if "slide" in {parameter.name for parameter in case.operation.iter_parameters()} and case.path != "/panel/events":
        case.query = {**(case.query if isinstance(case.query, dict) else {}), "slide": backend.token}
    if "{token}" in case.path:
        case.path_parameters = {**case.path_parameters, "token": backend.token}
    if case.path.startswith("/api/bags/") or case.path.startswith("/slides/"):
        case.path_parameters = {**case.path_parameters, "key": backend.key}
    if case.path == "/webhook":
        case.headers = {**(case.headers or {}), "X-WSC-Webhook-Secret": backend.services.webhook_secret}
