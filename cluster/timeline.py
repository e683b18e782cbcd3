"""How a figure of a run went against the time that training took, from TensorBoard's files in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Point:
    """The figure after `step` steps and `seconds` of work."""

    step: int
    seconds: float
    value: float


def timeline(exp_dir: Path, figure: str) -> tuple[list[Point], float]:
    """The points of a figure, and the seconds of all launches together.

    Only the time in which a launch was at work counts, from its first entry to its last. What a later launch
    went through again is counted twice in seconds, as it was paid for twice, but has one point.
    """
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    points, spent = dict[int, Point](), 0.0
    for file in sorted((exp_dir / "tensorboard").glob("events.out.tfevents.*")):
        begun = last = None
        for event in EventFileLoader(str(file)).Load():
            begun = event.wall_time if begun is None else begun
            last = event.wall_time
            for value in event.summary.value:
                if value.tag == figure:
                    number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
                    points[event.step] = Point(event.step, spent + last - begun, float(number))
        spent += last - begun if begun is not None and last is not None else 0.0
    return [points[step] for step in sorted(points)], spent
