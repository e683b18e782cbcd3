"""Tell how far a loop is: by a bar on a terminal, by a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def progress(
    items: Sequence[T], doing: str, unit: str = "sheets", every: float = 30.0, shown: bool = True
) -> Iterator[T]:
    """Yield the items, and tell on standard error how many are done.

    doing: what is done with them, such as "validation". every: seconds from one line to the next where
    standard error is no terminal; a loop that takes less says nothing. shown: False on all ranks but one.
    """
    if not shown:
        yield from items
    elif sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, desc=doing, unit=f" {unit}", leave=False, dynamic_ncols=True)
    else:
        start = told = time.monotonic()
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - told >= every:
                told, rest = now, (now - start) / done * (len(items) - done)
                line = (
                    f"{doing}: {done} of {len(items)} {unit}, {now - start:.0f} s, about {rest:.0f} s to go"
                )
                print(line, file=sys.stderr, flush=True)
            yield item
