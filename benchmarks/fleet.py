"""Many GPUs on one Redis, one store and one Label Studio, simulated event by event from what one slide was measured to cost.

    .venv/bin/python benchmarks/fleet.py

What cannot be had here (a thousand GPUs) is simulated with SimPy; what can be had is measured (`benchmarks/scaling.py`) and stands in :class:`Costs`. Arithmetic
says how much load there is; the simulation says what waiting comes of it: for a GPU that wants its next slide, and for a prediction that is to be pushed.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from typing import Any

import simpy

Steps = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Costs:
    """What one slide costs, in the units of the names. Measured on two cores, see docs/SCALING.md, but for the GPU's rate, which is the target for one H100."""

    gpu_s: float = 1.0  # 10 000 tiles at 10 000 tiles a second
    gpu_spread: float = 0.5  # standard deviation over mean: slides differ in size
    redis_commands: float = 149.0
    redis_command_s: float = 1 / 24_850
    progress_commands_per_s: float = 8.0
    beat_commands_per_s: float = 1.5
    result_bytes: float = 16.7e6
    push_s: float = 0.24


@dataclass(frozen=True)
class Fleet:
    """What stands around the GPUs.

    Attributes
    ----------
    gpus
        Analysis workers in all, each at one slide at a time.
    redises
        Backends with a Redis each, among which the GPUs are divided.
    push_workers
        Workers for the queue ``publish``, in all.
    label_studio_parallel
        Requests that Label Studio works on at once.
    store_bytes_per_s
        What the store takes in all.
    """

    gpus: int
    redises: int = 1
    push_workers: int = 1
    label_studio_parallel: int = 1
    store_bytes_per_s: float = 1e12


@dataclass
class Seen:
    """What a run has shown after its warm-up."""

    seconds: float = 0.0
    slides: int = 0
    pushes: int = 0
    busy_s: float = 0.0
    redis_s: float = 0.0
    turnaround_s: list[float] = field(default_factory=list)
    waiting_pushes: int = 0


def simulate(fleet: Fleet, costs: Costs, *, seconds: float = 120.0, warm_up_s: float = 20.0, seed: int = 1) -> Seen:
    """Run a fleet that never lacks slides.

    Parameters
    ----------
    seconds
        Simulated time that counts, after ``warm_up_s`` that does not.

    Returns
    -------
    Seen
        Slides and pushes that were finished in that time, seconds that GPUs and Redises were busy (summed), the time from the end of each slide on a GPU to
        the beginning of the next one there, and how many pushes waited in the end.
    """
    env, dice, seen = simpy.Environment(), random.Random(seed), Seen(seconds=seconds)
    redises = [simpy.Resource(env) for _ in range(fleet.redises)]
    store = simpy.Resource(env)
    label_studio = simpy.Resource(env, fleet.label_studio_parallel)
    pushes = simpy.Store(env)
    # The logarithm's mean and deviation, so that the seconds have the mean and the spread that they should have.
    variance = math.log1p(costs.gpu_spread**2)
    mean, sigma = math.log(costs.gpu_s) - variance / 2, math.sqrt(variance)

    def counts() -> bool:
        return env.now >= warm_up_s

    def ask(redis: simpy.Resource, commands: float) -> Steps:
        took = commands * costs.redis_command_s
        with redis.request() as turn:
            yield turn
            yield env.timeout(took)
        if counts():
            seen.redis_s += took

    def gpu(redis: simpy.Resource) -> Steps:
        ended: float | None = None
        while True:
            yield from ask(redis, costs.redis_commands * 0.4)  # taking the job, starting it
            if ended is not None and counts():
                seen.turnaround_s.append(env.now - ended)
            work = dice.lognormvariate(mean, sigma)
            yield env.timeout(work)
            if counts():
                seen.busy_s += min(work, env.now - warm_up_s)
            ended = env.now
            with store.request() as turn:
                yield turn
                yield env.timeout(costs.result_bytes / fleet.store_bytes_per_s)
            yield from ask(redis, costs.redis_commands * 0.4)  # ending it
            pushes.put(redis)
            if counts():
                seen.slides += 1

    def push_worker() -> Steps:
        while True:
            redis = yield pushes.get()
            yield from ask(redis, costs.redis_commands * 0.2)
            with label_studio.request() as turn:
                yield turn
                yield env.timeout(costs.push_s)
            if counts():
                seen.pushes += 1

    def beside(redis: simpy.Resource, commands_per_s: float) -> Steps:
        """Heartbeats, and progress of running slides, of all workers of one Redis: a tenth of a second of them at a time."""
        while True:
            yield env.timeout(0.1)
            yield from ask(redis, commands_per_s / 10)

    for number, redis in enumerate(redises):
        own = len(range(number, fleet.gpus, fleet.redises))
        env.process(beside(redis, own * (costs.progress_commands_per_s + costs.beat_commands_per_s)))
        for _ in range(own):
            env.process(gpu(redis))
    for _ in range(fleet.push_workers):
        env.process(push_worker())
    env.run(until=warm_up_s + seconds)
    seen.waiting_pushes = len(pushes.items)
    return seen


SCENARIOS: list[tuple[str, Fleet]] = [
    ("10 GPUs, as installed", Fleet(10)),
    ("10 GPUs, Label Studio answers 4 at once, 4 push workers", Fleet(10, push_workers=4, label_studio_parallel=4)),
    ("100 GPUs, as installed", Fleet(100)),
    ("100 GPUs, 32 push workers and as many answers", Fleet(100, push_workers=32, label_studio_parallel=32)),
    (
        "100 GPUs, the same, store of 1 GB/s",
        Fleet(100, push_workers=32, label_studio_parallel=32, store_bytes_per_s=1e9),
    ),
    ("1000 GPUs, one Redis", Fleet(1000, push_workers=320, label_studio_parallel=320)),
    ("1000 GPUs, 10 Redises", Fleet(1000, redises=10, push_workers=320, label_studio_parallel=320)),
]


def row(name: str, fleet: Fleet, costs: Costs) -> str:
    """A line of the table in docs/SCALING.md."""
    seen = simulate(fleet, costs)
    turnaround = sorted(seen.turnaround_s) or [float("nan")]
    p99 = turnaround[min(len(turnaround) - 1, int(0.99 * len(turnaround)))]
    return (
        f"| {name} | {seen.slides / seen.seconds:.1f} | {100 * seen.busy_s / (seen.seconds * fleet.gpus):.0f} % | "
        f"{100 * seen.redis_s / (seen.seconds * fleet.redises):.0f} % | {1000 * statistics.median(turnaround):.0f} / {1000 * p99:.0f} | "
        f"{seen.pushes / seen.seconds:.1f} | {seen.waiting_pushes} |"
    )


def main() -> None:
    """Print the table."""
    print(
        "| | slides/s | GPUs busy | Redis busy | from slide to slide, p50 / p99 ms | pushes/s | pushes waiting after 140 s |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    costs = Costs()
    for name, fleet in SCENARIOS:
        print(row(name, fleet, costs))
    halved = replace(costs, gpu_s=2 * costs.gpu_s)
    print(row("1000 GPUs at half the rate, one Redis", SCENARIOS[5][1], halved))


if __name__ == "__main__":
    main()
