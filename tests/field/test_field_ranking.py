"""Ranks are written where people look: the first few hundred of the order, and what would stand among them wrongly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from backend.label_studio import ranking


def test_a_large_project_gets_its_first_ranks_and_no_rank_of_earlier_stays_among_them(monkeypatch: Any) -> None:
    n, written = 1000, dict[int, dict[str, Any]]()
    monkeypatch.setattr(
        ranking, "TaskFields", lambda *_: SimpleNamespace(set=lambda task, fields: written.update({task: dict(fields)}))
    )
    priority = np.arange(1, n + 1)
    priority[7] = 0  # labelled since
    before = {7: 8, 900: 3, 950: 901}
    slides = [SimpleNamespace(task=i, data={"priority": before[i]} if i in before else {}) for i in range(n)]
    snapshot = SimpleNamespace(
        priority=priority, tasks=np.arange(n), confidence=np.full(n, 0.5), novelty=np.full(n, 0.25)
    )
    services = SimpleNamespace(client=None, training=SimpleNamespace(again=lambda _: False))
    done = ranking.write_ranks(services, 7, SimpleNamespace(slides=slides), snapshot, lambda *_: None)
    first = set(range(ranking.RANKED + 1)) - {7}
    assert set(written) == first | {7, 900} and done == len(written)
    assert written[7]["priority"] is None and written[900]["priority"] == 901
    assert written[0] == {"priority": 1, "novelty": 0.25, "confidence": 0.5}
