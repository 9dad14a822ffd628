"""Many people at once: the benchmark of load in small. Nobody is refused, everything that was begun ends, nothing is there twice."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import benchmark


@pytest.fixture(scope="module")
def load() -> ModuleType:
    return benchmark("load")


@pytest.mark.faults_long  # answers that may have been lost are made up for after a minute, which is waited for
@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="memory of other processes is read from /proc, which only Linux has"
)
def test_many_people_at_once(load: ModuleType, stand_in: Path) -> None:
    size = load.Size(opens=60, webhooks=300, streams=20, rounds=2, retrieve=600, panels=10, slides=10, turns=1)
    rows = load.run(size, stand_in)
    everything = rows["all of it"]
    assert everything["errors"] == 0, everything
    assert everything["queue_drained"] == "true"
    assert everything["doubled"] == everything["without_prediction"] == 0
    assert rows["60 annotators open a task at once, × 2"]["requests"] == 120
    assert everything["predictions_pushed"] >= 120 + 600 - 500, "what one answer has no room for is pushed"
