"""Race ours against a peer at the same work: in turn, round after round, in one process.

CPU seconds of the process are counted, so that load from elsewhere falls on both. A line is printed for each
work: both medians, the median of the rounds' ratios (above 1: ours is faster), and the goal it is held to.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from statistics import median

ROUNDS = 5  # at least


def describe_machine(*packages: str) -> str:
    """One line: the processor, the load at the start, Python and the versions of the packages that race."""
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    busy = f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    return f"{models[0]}, {busy}; Python {platform.python_version()}, {versions}"


def cpu_seconds(work: Callable[[], object], repeat: int = 1) -> float:
    """CPU seconds of this process that one call takes, as the mean of `repeat` calls."""
    begun = time.process_time()
    for _ in range(repeat):
        work()
    return (time.process_time() - begun) / repeat


def race(
    work: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    peer_name: str,
    goal: float | None = None,
    rounds: int = 7,
    repeat: int = 1,
) -> float:
    """Call both in turn for `rounds` rounds, after one call of each that isn't counted; print the line.

    repeat: calls a round. Returns the median of the rounds' ratios of CPU seconds, the peer's by ours.
    """
    if rounds < ROUNDS:
        raise ValueError(f"{rounds} rounds are too few for a median; take at least {ROUNDS}")
    ours(), peer()
    times = [(cpu_seconds(ours, repeat), cpu_seconds(peer, repeat)) for _ in range(rounds)]
    return tell_ratio(work, times, peer_name, goal)


def tell_ratio(work: str, times: list[tuple[float, float]], peer_name: str, goal: float | None) -> float:
    """Print the line of a race whose rounds took these CPU seconds, ours and the peer's; return the ratio."""
    mine, theirs = (median(column) for column in zip(*times, strict=True))
    ratio = median(b / a for a, b in times)
    held = "" if goal is None else f" (goal {goal:g}{'' if ratio >= goal else ', missed'})"
    print(
        f"{work}: {1e3 * mine:.4g} ms, {peer_name} {1e3 * theirs:.4g} ms; {len(times)} rounds, "
        f"ratio {ratio:.2f}{held}",
        flush=True,
    )
    return ratio
