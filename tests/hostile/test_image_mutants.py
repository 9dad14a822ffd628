"""Damaged slides and images, thousands of them, through everything that a worker and the panel do with a file: none kills or hangs the process.

Mutants are read in child processes, many in each, because a crash in a C library would take the test with it.
"""

from __future__ import annotations

import json
import os
import queue
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hostile.mutant_reader import CPU_S
from hostile.mutation import bombs, tiff_entries, write_seeds
from reliability_report import record

from backend.errors import SlideUnreadable
from backend.settings import load_settings
from backend.slides.reader import open_slide

TESTS = Path(__file__).resolve().parents[1]
MUTANTS = int(os.environ.get("WSC_MUTANTS") or 2400)
CHILDREN = 2
SILENT_S = 120  # no word from a child for so long: it waits for something that uses no processor


@dataclass(frozen=True)
class Outcome:
    """What came of one mutant: ``good``, ``typed``, ``untyped``, ``hang`` or ``crash``."""

    number: int
    seed: str
    damage: str
    outcome: str
    detail: str
    cpu_s: float


def read_mutants(folder: Path, first: int, step: int, count: int) -> list[Outcome]:
    """Read mutants ``first``, ``first + step``, … in a child process; a new one after each mutant that it does not survive."""
    outcomes: list[Outcome] = []
    start = first
    while start < count:
        process = subprocess.Popen(
            [
                sys.executable,
                str(TESTS / "hostile" / "mutant_reader.py"),
                str(folder),
                str(start),
                str(count),
                str(step),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS), str(TESTS.parent))), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libtiff and Pillow warn of what is broken, at length
            text=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process, lines), daemon=True).start()
        begun: dict[str, Any] | None = None
        silent = False
        while True:
            try:
                line = lines.get(timeout=SILENT_S)
            except queue.Empty:
                silent = True
                process.kill()
                break
            if line is None:
                break
            said = json.loads(line)
            if "begin" in said:
                begun = said
            else:
                assert begun is not None
                outcomes.append(
                    Outcome(
                        begun["begin"], begun["seed"], begun["damage"], said["outcome"], said["detail"], said["cpu_s"]
                    )
                )
                begun = None
        status = process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if begun is None:
            assert status == 0, f"the reader ended with {status} before its first mutant"
            break
        hung = silent or status == -27  # SIGPROF: out of processor time
        what = "no word" if silent else f"signal {-status}" if status < 0 else f"status {status}"
        outcomes.append(
            Outcome(begun["begin"], begun["seed"], begun["damage"], "hang" if hung else "crash", what, float(CPU_S))
        )
        start = begun["begin"] + step
    return outcomes


def _pass_on(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "seeds").mkdir()
    write_seeds(folder / "seeds")
    found: list[list[Outcome]] = [[] for _ in range(CHILDREN)]

    def run(child: int) -> None:
        found[child] = read_mutants(folder, child, CHILDREN, MUTANTS)

    threads = [threading.Thread(target=run, args=(child,)) for child in range(CHILDREN)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted((outcome for part in found for outcome in part), key=lambda outcome: outcome.number)


def of(outcomes: list[Outcome], kind: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.outcome == kind]


def test_every_mutant_was_tried_and_both_ways_out_were_taken(outcomes: list[Outcome]) -> None:
    assert [outcome.number for outcome in outcomes] == list(range(MUTANTS))
    good, typed = of(outcomes, "good"), of(outcomes, "typed")
    # A mutator that breaks everything at once, or nothing, would prove nothing.
    assert len(good) > MUTANTS / 10
    assert len(typed) > MUTANTS / 10
    assert len({outcome.detail for outcome in good}) >= 6, "many readers were reached"
    assert len({outcome.detail for outcome in typed}) >= 4, "many errors were reached"
    for seed in dict.fromkeys(outcome.seed for outcome in outcomes if outcome.damage != "bomb"):
        counts = Counter(outcome.outcome for outcome in outcomes if outcome.seed == seed)
        record(
            "mutants",
            f"mutants of {seed}",
            tried=sum(counts.values()),
            typed_errors=counts["typed"],
            good_reads=counts["good"],
            other_errors=counts["untyped"],
            crashes=counts["crash"],
            hangs=counts["hang"],
        )
    counts = Counter(outcome.outcome for outcome in outcomes if outcome.damage == "bomb")
    record(
        "mutants",
        "headers of 100 000 × 100 000 pixels",
        tried=sum(counts.values()),
        typed_errors=counts["typed"],
        good_reads=counts["good"],
        other_errors=counts["untyped"],
        crashes=counts["crash"],
        hangs=counts["hang"],
    )


def test_no_mutant_kills_the_process(outcomes: list[Outcome]) -> None:
    assert of(outcomes, "crash") == []


def test_no_mutant_holds_the_process(outcomes: list[Outcome]) -> None:
    assert of(outcomes, "hang") == []


def test_every_mutant_that_cannot_be_read_ends_in_an_error_of_ours(outcomes: list[Outcome]) -> None:
    assert of(outcomes, "untyped") == []


def test_a_header_of_100_000_x_100_000_pixels_is_refused(outcomes: list[Outcome]) -> None:
    answered = {outcome.seed: outcome.detail for outcome in outcomes if outcome.damage == "bomb"}
    assert set(answered) == set(bombs())
    assert set(answered.values()) <= {"slide_too_large", "slide_unreadable"}


def test_a_tile_that_no_machine_has_room_for_is_refused_before_a_c_library_asks_for_it(tmp_path: Path) -> None:
    """The allocator under OpenSlide ends the process where there is not so much memory: here that would be this test."""
    sound = next(path for path in write_seeds(tmp_path) if path.name == "aperio.svs").read_bytes()
    for tags, value, words in (
        ((322, 323), 1 << 20, "a tile has 1048576 x 1048576 pixels"),
        ((256, 257), 100_000, "are listed"),
    ):
        data = bytearray(sound)
        order, _, entries, _ = tiff_entries(data)
        for tag in tags:
            at = next(position for position, found in entries if found == tag)
            struct.pack_into(f"{order}HHII", data, at, tag, 4, 1, value)
        (tmp_path / "hurt.svs").write_bytes(data)
        with pytest.raises(SlideUnreadable, match=words):
            open_slide(tmp_path / "hurt.svs", load_settings(model_dir=tmp_path))
