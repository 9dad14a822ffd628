"""The simulation of many GPUs gives what queueing theory gives where that has an answer."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
from scripts import benchmark


@pytest.fixture(scope="module")
def fleet() -> ModuleType:
    return benchmark("fleet")


def test_where_nothing_is_in_the_way_every_gpu_is_busy(fleet: ModuleType) -> None:
    costs = replace(fleet.Costs(), redis_command_s=1e-9, push_s=1e-6)
    seen = fleet.simulate(fleet.Fleet(20), costs, seconds=200)
    assert seen.slides / seen.seconds == pytest.approx(20 / costs.gpu_s, rel=0.05)
    assert seen.busy_s / seen.seconds == pytest.approx(20, rel=0.02)


@pytest.mark.parametrize("answers", [1, 3])
def test_a_slow_label_studio_takes_as_many_pushes_as_it_can_and_the_rest_waits(fleet: ModuleType, answers: int) -> None:
    costs = fleet.Costs()
    seen = fleet.simulate(fleet.Fleet(30, push_workers=8, label_studio_parallel=answers), costs)
    assert seen.pushes / seen.seconds == pytest.approx(answers / costs.push_s, rel=0.03)
    assert seen.waiting_pushes == pytest.approx((30 / costs.gpu_s - answers / costs.push_s) * 140, rel=0.1)


def test_a_redis_that_is_full_up_is_what_limits_the_slides(fleet: ModuleType) -> None:
    costs = replace(fleet.Costs(), progress_commands_per_s=0, beat_commands_per_s=0, push_s=1e-6)
    seen = fleet.simulate(fleet.Fleet(600, push_workers=600, label_studio_parallel=600), costs, seconds=60)
    assert seen.redis_s / seen.seconds == pytest.approx(1, rel=0.02)
    assert seen.slides / seen.seconds == pytest.approx(1 / (costs.redis_commands * costs.redis_command_s), rel=0.05)
    split = fleet.simulate(fleet.Fleet(600, redises=6, push_workers=600, label_studio_parallel=600), costs, seconds=60)
    assert split.slides / split.seconds == pytest.approx(600 / costs.gpu_s, rel=0.05)


def test_a_store_that_is_full_up_is_what_limits_the_slides(fleet: ModuleType) -> None:
    costs = fleet.Costs()
    narrow = fleet.Fleet(50, push_workers=50, label_studio_parallel=50, store_bytes_per_s=10 * costs.result_bytes)
    seen = fleet.simulate(narrow, costs, seconds=60)
    assert seen.slides / seen.seconds == pytest.approx(10, rel=0.03)
