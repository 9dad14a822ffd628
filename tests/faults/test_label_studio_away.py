"""Label Studio is away, broken, slow or forgetful, or the HTTP process dies while somebody waits: each slide gets one prediction."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
import pytest
from fault_rig import SHORTENED_CLAIM_S, STORES_LATE_S, Rig, assert_none_lost, eventually
from label_studio_stub import Fault, StudioStub
from redis_rig import OwnRedis
from reliability_report import record


@contextmanager
def away(studio: StudioStub) -> Iterator[None]:
    studio.stop()
    yield
    studio.start()


@contextmanager
def answering(studio: StudioStub, fault: Fault) -> Iterator[None]:
    with studio.choosing(lambda _method, _path: fault):
        yield


@contextmanager
def token_refused(studio: StudioStub) -> Iterator[None]:
    studio.accepted_token = "another"
    yield
    studio.accepted_token = None


Breaker = Callable[[StudioStub], AbstractContextManager[None]]
HTML = "<html><body>Back soon</body></html>"
FAULTS: dict[str, tuple[Breaker, str]] = {
    "away": (away, "does not answer"),
    "answers 500": (lambda studio: answering(studio, Fault(status=500)), "answers 500"),
    "token refused (401)": (token_refused, "refuses the token (401)"),
    "slower than is waited for, and stores": (
        lambda studio: answering(studio, Fault(after_s=2.5, effect=True)),
        "does not answer: no answer came in time",
    ),
    "cuts connections after storing": (
        lambda studio: answering(studio, Fault(cut=True, effect=True)),
        "does not answer",
    ),
    "another page in its place, 200": (
        lambda studio: answering(studio, Fault(status=200, body=HTML)),
        "something else answers",
    ),
    "another page in its place, 404": (
        lambda studio: answering(studio, Fault(status=404, body="404 page not found")),
        "something else answers",
    ),
    "too many requests (429)": (lambda studio: answering(studio, Fault(status=429)), "answers 429"),
}

SHORT = ("away", "answers 500", "token refused (401)", "slower than is waited for, and stores")


@pytest.mark.parametrize(
    "fault", [fault if fault in SHORT else pytest.param(fault, marks=pytest.mark.faults_long) for fault in FAULTS]
)
def test_label_studio_fails_while_a_slide_is_pushed(rig: Rig, fault: str) -> None:
    break_it, reason = FAULTS[fault]
    names = [f"{''.join(c for c in fault if c.isalnum())}-{i}" for i in range(2)]
    rig.hold(f"{names[0]}.encode")
    rig.ask(*names)
    rig.reached(f"{names[0]}.encode")
    with break_it(rig.studio):
        rig.release(f"{names[0]}.encode")

        def said() -> list[str]:
            pushes = [job for name in names for job in rig.queue.jobs(1000) if f"task {rig.task(name)} of" in job.about]
            assert not any(job.status == "failed" for job in pushes), pushes
            return [job.error["message"] for job in pushes if job.error]

        eventually(lambda: any(reason in message for message in said()), f"the job list says {reason!r}")
    tally = rig.settle(*names)
    assert_none_lost(tally, rig)
    assert [rig.runs(name) for name in names] == [1, 1], "only the push is repeated"
    record("faults", f"Label Studio {fault}", **tally.counts())


@pytest.mark.faults_long
def test_what_was_stored_before_the_answer_was_lost_is_not_stored_twice(rig: Rig) -> None:
    """The worst case of the above: only the answer to the storing itself is lost, every time."""
    lost = iter(range(3))

    def choose(method: str, path: str) -> Fault | None:
        if method == "POST" and path == "/api/predictions":
            return Fault(cut=True, effect=True) if next(lost, None) is not None else None
        return None

    with rig.studio.choosing(choose):
        rig.ask("stored-unheard")
        tally = rig.settle("stored-unheard")
    assert_none_lost(tally, rig)
    assert next(lost, None) is not None or rig.studio.of(rig.task("stored-unheard"))
    record("faults", "Label Studio stores a prediction and its answer is lost", **tally.counts())


@pytest.mark.faults_long
def test_what_is_stored_long_after_it_was_given_up_is_not_there_twice(rig: Rig) -> None:
    """Label Studio works on a request for longer than is waited, and ends it after the next try has stored the same."""
    late = iter([Fault(before_s=STORES_LATE_S - 2, effect=True)])

    def choose(method: str, path: str) -> Fault | None:
        return next(late, None) if method == "POST" and path == "/api/predictions" else None

    stored: list[int] = []
    with rig.studio.choosing(choose):
        rig.ask("stored-late")
        eventually(
            lambda: stored.append(len(rig.studio.of(rig.task("stored-late")))) or stored[-1] > 1, "both are stored"
        )
        tally = rig.settle("stored-late")
    assert 1 in stored, "the second try came first"
    assert_none_lost(tally, rig)
    record("faults", "Label Studio stores a prediction after it was given up", **tally.counts())


@pytest.mark.parametrize("what", ["task", "project"])
def test_what_was_deleted_meanwhile_is_let_go_and_the_others_are_not(rig: Rig, what: str) -> None:
    gone, there = f"{what}-gone", f"{what}-there"
    rig.hold(f"{gone}.encode")
    rig.ask(gone, there) if what == "task" else rig.ask(gone)
    rig.reached(f"{gone}.encode")
    if what == "task":
        data = rig.studio.tasks.pop(rig.task(gone))
    else:
        rig.studio.project_deleted = True
    rig.release(f"{gone}.encode")
    said = f"task {rig.task(gone)} was deleted in Label Studio, nothing to push"
    eventually(lambda: said in rig.log(), "the push ends, and the log says why")
    if what == "task":
        rig.studio.tasks[rig.task(gone)] = data
    rig.studio.project_deleted = False
    if what == "project":
        rig.ask(there)
    tally = rig.settle(there)
    assert_none_lost(tally, rig)
    assert not rig._under_way([gone]) and rig.queue.waiting(rig.key(gone)) == [], "nothing is left to be done"
    assert not any(f"task {rig.task(gone)} of" in job.about for job in rig.queue.jobs(1000, "failed"))
    record("faults", f"{what} deleted in Label Studio mid-job", **tally.counts())


@pytest.mark.faults_long
def test_an_access_token_that_label_studio_has_forgotten_is_exchanged(
    make_rig: Callable[..., Rig], own_redis: OwnRedis
) -> None:
    rig = make_rig(
        redis_url=own_redis.url,
        label_studio_api_key=StudioStub.personal_access_token(),
        tweaks={"backend.jobs.job_forms.PUBLISH_BACKOFF_CAP_S": 2},
    )
    rig.serve()
    rig.pool()
    rig.studio.new_access_token()  # from now on only one that was exchanged for the personal one is accepted
    rig.ask("before")
    assert_none_lost(rig.settle("before"), rig)
    rig.studio.new_access_token()  # as after a restart of Label Studio with another secret; ours would hold for minutes
    rig.ask("after")
    tally = rig.settle("before", "after")
    assert_none_lost(tally, rig)
    record("faults", "Label Studio has forgotten the access token", **tally.counts())


def ask_in_vain(rig: Rig, name: str) -> threading.Thread:
    def ask() -> None:
        with pytest.raises(httpx.TransportError):
            rig.ask(name)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("redis", ["own", pytest.param("embedded", marks=pytest.mark.faults_long)])
def test_the_http_process_is_killed_while_somebody_waits_in_predict(
    make_rig: Callable[..., Rig], own_redis: OwnRedis, redis: str
) -> None:
    options = {"redis_url": own_redis.url} if redis == "own" else {}
    rig = make_rig(predict_wait_s=30, job_retries=10, **options)
    serve = rig.serve() if redis == "own" else rig.serve("--with-workers")
    if redis == "own":
        rig.pool()
    rig.hold("waited-for.encode")
    waits = ask_in_vain(rig, "waited-for")
    rig.reached("waited-for.encode")
    serve.kill()
    waits.join(30)
    rig.release("waited-for.encode")
    if redis == "embedded":
        rig.serve("--with-workers")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    record("faults", f"HTTP process killed during /predict, {redis} Redis", **tally.counts())


@pytest.mark.faults_long
def test_an_answer_that_never_arrives_is_made_up_for(rig: Rig) -> None:
    name = "answer-lost"
    rig.ask(name)
    assert_none_lost(rig.settle(name), rig)
    task = rig.task(name)
    time.sleep(SHORTENED_CLAIM_S + 0.5)  # the claim of the push above
    rig.studio.forget(task)
    given = httpx.post(f"{rig.backend_url}/predict", json=rig.studio.question([task]), timeout=30, trust_env=False)
    assert given.json()["results"] != [[]], "it was handed out, and then lost: nobody has stored it"
    tally = rig.settle(name)
    assert_none_lost(tally, rig)
    assert rig.runs(name) == 1
    record("faults", "answer to /predict lost on its way", **tally.counts())
