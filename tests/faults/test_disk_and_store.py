"""The disk is full while a result is written, a stored file is damaged, two workers store the same bag: one whole result, one prediction."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_rig import SHORTENED_CLAIM_S, Rig, assert_none_lost, eventually
from redis_rig import OwnRedis
from reliability_report import record


def fill(disk: Path) -> Path:
    """Leave no byte free; the file to delete."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (65_536, 4096, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return filler


def test_room_is_made_between_two_tries(rig: Rig, small_disk: Path) -> None:
    filler = fill(small_disk)
    rig.ask("tried-again")
    state = eventually(lambda: (s := rig.state("tried-again")) and s.error and s, "the first try fails")
    assert state.error["code"] == "store_unavailable"
    assert "No space left on device" in state.error["message"], "the reason is the disk, and the job list says so"
    filler.unlink()
    tally = rig.settle("tried-again")
    assert_none_lost(tally, rig)
    record("faults", "disk full while storing, then room", **tally.counts())


@pytest.mark.faults_long
def test_a_disk_that_stays_full_is_a_failure_with_its_reason_until_there_is_room(rig: Rig, small_disk: Path) -> None:
    filler = fill(small_disk)
    pids = {worker["pid"] for worker in rig.queue.workers()}
    rig.ask("no-room")
    tally = rig.settle("no-room")
    assert_none_lost(tally, rig, failed=1)
    assert "No space left on device" in tally.failed["no-room"]
    assert {worker["pid"] for worker in rig.queue.workers()} == pids, "no worker died of it"
    assert not list(small_disk.rglob("*.tmp")), "nothing half written is left on the full disk"
    record("faults", "disk full while storing, for good", **tally.counts())
    filler.unlink()
    rig.ask("no-room")
    tally = rig.settle("no-room")
    assert_none_lost(tally, rig)
    record("faults", "disk full while storing, asked again with room", **tally.counts())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """Flip one bit in the middle of the slide embedding's bytes, which every answer needs… or wherever h5py put it."""
    import h5py

    with h5py.File(path, "r") as file:
        offset = file["attention_logits"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(offset + 5)
        byte = file.read(1)
        file.seek(offset + 5)
        file.write(bytes([byte[0] ^ 0x10]))


def empty(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES: dict[str, Callable[[Path], None]] = {"truncated": truncate, "a bit flipped": flip, "empty": empty}


def stored_file(rig: Rig, name: str) -> Path:
    key = rig.key(name)
    return Path(rig.settings.results_location) / key[:2] / f"{key}.h5"


@pytest.mark.parametrize(
    "damage",
    ["truncated", *(pytest.param(name, marks=pytest.mark.faults_long) for name in ("a bit flipped", "empty"))],
)
def test_a_damaged_result_is_computed_again_when_asked_for(rig: Rig, damage: str) -> None:
    name = f"damaged-{damage.replace(' ', '-')}"
    rig.ask(name)
    assert_none_lost(rig.settle(name), rig)
    right = rig.studio.of(rig.task(name))[0]["result"]
    DAMAGES[damage](stored_file(rig, name))
    rig.studio.forget(rig.task(name))
    time.sleep(SHORTENED_CLAIM_S)  # of the push just done
    rig.ask(name)
    tally = rig.settle(name)
    assert_none_lost(tally, rig)
    assert rig.studio.of(rig.task(name))[0]["result"] == right, "nothing of the damaged file is shown"
    aside = list(stored_file(rig, name).parent.glob("*.damaged-*"))
    # A server that answered the first question itself still remembers what it said, and has no need of the file.
    assert (rig.runs(name), len(aside)) in ((2, 1), (1, 0)), (
        "computed again, and the file kept for whoever wants to know why"
    )
    record("faults", f"stored result {damage}, asked for", **tally.counts())


def test_a_result_that_is_damaged_before_it_is_pushed_is_computed_again(rig: Rig) -> None:
    rig.hold("unpushed.stored")
    rig.ask("unpushed")
    rig.reached("unpushed.stored")
    truncate(stored_file(rig, "unpushed"))
    rig.release("unpushed.stored")
    tally = rig.settle("unpushed")
    assert_none_lost(tally, rig)
    assert rig.runs("unpushed") == 2
    record("faults", "stored result truncated before it is pushed", **tally.counts())


def test_a_result_that_shows_late_is_waited_for(rig: Rig) -> None:
    """As on a file system of a network, whose machines remember for a while that a file was not there."""
    rig.hold("shows-late.stored")
    rig.ask("shows-late")
    rig.reached("shows-late.stored")
    path = stored_file(rig, "shows-late")
    hidden = path.rename(path.with_suffix(".hidden"))
    rig.release("shows-late.stored")
    eventually(lambda: f"bag={rig.key('shows-late')} has no result although" in rig.log(), "it is missed")
    hidden.rename(path)
    tally = rig.settle("shows-late")
    assert_none_lost(tally, rig)
    assert rig.runs("shows-late") == 1, "there was no need to compute it again"
    record("faults", "stored result shows only later", **tally.counts())


@pytest.mark.faults_long
def test_a_result_that_is_gone_is_computed_again(rig: Rig) -> None:
    rig.hold("vanishes.stored")
    rig.ask("vanishes")
    rig.reached("vanishes.stored")
    stored_file(rig, "vanishes").unlink()
    rig.release("vanishes.stored")
    tally = rig.settle("vanishes")
    assert_none_lost(tally, rig)
    assert rig.runs("vanishes") == 2
    record("faults", "stored result is gone", **tally.counts())


@pytest.mark.faults_long
def test_workers_that_store_elsewhere_are_a_failure_that_says_so(
    make_rig: Callable[..., Rig], own_redis: OwnRedis, tmp_path: Path
) -> None:
    rig = make_rig(redis_url=own_redis.url, tweaks={"backend.jobs.tasks.LOOK_FOR_RESULT_S": 1})
    rig.serve()
    rig.ask("elsewhere")
    rig.worker("interactive,batch", RESULTS_URL=str(tmp_path / "another-store"))
    rig.worker("publish")
    tally = rig.settle("elsewhere")
    assert_none_lost(tally, rig, failed=1)
    assert "result_not_found: The slide was analysed, and its result is not in" in tally.failed["elsewhere"]
    record("faults", "a worker stores its results elsewhere", **tally.counts())


@pytest.mark.faults_long
def test_two_workers_store_the_same_bag(make_rig: Callable[..., Rig], own_redis: OwnRedis) -> None:
    """A worker is frozen in the middle of writing, another takes the slide over, and the first thaws: both write at once."""
    rig = make_rig(redis_url=own_redis.url)
    rig.serve()
    rig.hold("twice.store")
    rig.ask("twice")
    first = rig.worker("interactive,batch,publish")
    assert rig.reached("twice.store") == first.pid
    first.signal(signal.SIGSTOP)
    second = rig.worker("interactive,batch,publish")
    eventually(lambda: any(line.endswith(str(second.pid)) for line in rig.ledger("reached")), "it is taken over")
    eventually(lambda: rig.reached("twice.store") == second.pid, "both are writing")
    first.signal(signal.SIGCONT)
    rig.release("twice.store")
    tally = rig.settle()
    assert_none_lost(tally, rig)
    assert first.alive() and second.alive()
    results = Path(rig.settings.results_location)
    assert [path.name for path in results.rglob("*") if path.is_file()] == [f"{rig.key('twice')}.h5"]
    assert rig.services.store.need(rig.key("twice")).bag is not None, "it can be read"
    record("faults", "two workers store the same bag (one frozen and thawed)", **tally.counts())


@pytest.mark.faults_long
def test_the_whole_disk_with_everything_is_full(
    small_disk: Path, small_slide: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """MODEL_DIR itself: results, the embedded Redis' file, caches."""
    folder = small_disk / "model-dir"
    (folder / "slides").mkdir(parents=True)
    slide = shutil.copy(small_slide, folder / "slide.tif")  # hard links do not leave a file system
    rig = Rig(folder, Path(slide), checkpoint, job_retries=10)
    try:
        rig.serve("--with-workers")
        rig.hold("running.encode")
        rig.ask("running")
        rig.reached("running.encode")
        filler = fill(small_disk)
        rig.release("running.encode")
        time.sleep(5)
        filler.unlink()
        rig.ask_until_taken("running", "later")
        tally = rig.settle()
        assert_none_lost(tally, rig)
        record("faults", "the disk of MODEL_DIR full, embedded Redis on it", **tally.counts())
    finally:
        rig.close()
