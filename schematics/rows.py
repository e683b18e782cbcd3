"""What a row of a COCO file holds: ids, numbers and boxes, where usable, and the tally of findings."""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

Tally = Counter[tuple[str, str, str]]  # (kind, where, action) -> count
Box = tuple[float, float, float, float]  # x, y, width, height


def printable(text: str) -> str:
    r"""A name that can be written in one line: "\n" and the halves of surrogate pairs are escaped."""
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda bad: repr(bad[0])[1:-1], text)


def whole_number(value: Any) -> int | None:
    """The whole number of up to 64 bits that an id is, also from "7" and 7.0, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = int(value)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1 << 63 and (isinstance(value, str) or number == value) else None


def finite(value: Any) -> float | None:
    """The finite number that a value is, or None; a string is no number even if it looks like one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def drawn_box(row: Mapping[str, Any]) -> tuple[Box | None, str]:
    """x, y, width, height in px as labelled, or None if the row has no box; and how the box was repaired."""
    numbers, box = _numbers(row.get("bbox")), None
    if len(numbers) == 4:
        x, y, width, height = numbers
        box = x, y, width, height
        if width > 0 and height > 0:
            return box, ""
        if width and height:
            turned = min(x, x + width), min(y, y + height), abs(width), abs(height)
            return turned, "box drawn backwards: turned about"
    polygons = row.get("segmentation")
    outlines = [_numbers(polygon) for polygon in polygons] if isinstance(polygons, list) else []
    if outlines and all(len(outline) >= 6 and len(outline) % 2 == 0 for outline in outlines):
        left, top, right, bottom = (
            side(side(outline[axis::2]) for outline in outlines) for side in (min, max) for axis in (0, 1)
        )
        return (left, top, right - left, bottom - top), "box missing: taken from its outline"
    return box, ""


def _numbers(values: Any) -> list[float]:
    """The finite numbers that a list consists of, or [] if it is something else."""
    numbers = [finite(value) for value in values] if isinstance(values, list) else []
    return [] if None in numbers else [number for number in numbers if number is not None]
