"""Unlabelled windows in pairs: as a teacher sees one, and changed more strongly as its student does.

A sample is a window with ink of the pool's store (schematics/store.py), moved at random. The teacher sees it
as it is. The student sees the same place as a labelled window would be changed, with twice the changes of
tones, and with patches of paper over it. All of it is a function of (seed, epoch, position, window).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from cluster import distributed
from cluster.batches import Batches, Key
from detection.classes import match_classes
from detection.data import KEEP, Augment, TrainingWindows, crop_boxes, photometric, resize, shift, turn
from detection.data import collate as collate_labelled
from detection.model import as_tensor
from detection.spec import Spec
from schematics.coco import ANNOTATIONS, LabelledSheet, Split, read_split
from schematics.draws import Use, draw
from schematics.sheets import DataError, Sheet, find_sheets, to_color
from schematics.store import WindowStore, build_store
from schematics.windows import Color, Image, nearby_paper

JITTERED, JITTER = 10, 0.06  # copies of a box, and how far their corners move, a share of its sides
PATCHES, PATCH = 12, (0.01, 0.06)  # at most so many, and their sides as shares of the window's


class UnlabelledWindows(Dataset):
    """Item (epoch, position, window) -> a dict with the two versions of an unlabelled window.

    weak, strong: uint8 [3, side, side]. matrix: float32 [2, 3], from pixels of the first to those of the
    second. jitter: float32 [JITTERED, 4], see `teacher.jittered`. seed: for the detector's draws. truth: true
    boxes float32 [N, 4] in pixels of the first, and labels int64 [N], 0..K-1, of a sheet whose labels are
    known, which nothing is trained on; else None.

    side: to which a window of the store is shrunk, px. left_out: names of sheets that are not used. known: by
    name, sheets with labels, to measure with. Raises DataError if no window is left.
    """

    def __init__(
        self,
        store: WindowStore,
        side: int,
        color_mode: str,
        seed: int,
        augment: Augment,
        left_out: set[str],
        known: dict[str, LabelledSheet],
    ) -> None:
        self.store, self.side, self.color_mode = store, side, color_mode
        self.seed, self.augment, self.known = seed, augment, known
        used = np.array([name not in left_out for name in store.sheet_names])
        self.rows = np.flatnonzero(used[store.windows[:, 0]])
        if not len(self.rows):
            raise DataError(f"--unlabeled: all {len(used)} sheets are labelled ones; give others")

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int, at_least: int = 1) -> np.ndarray:
        """The windows of one epoch in random order, int64 [max(len(self), at_least)]."""
        order = draw(Use.POOL_ORDER, self.seed, epoch).permutation(len(self.rows))
        return np.resize(order, max(len(self.rows), at_least))

    def source(self, key: Key) -> str:
        return self.store.source(int(self.rows[key[2]]))

    def __getitem__(self, key: Key) -> dict[str, Any]:
        rng = draw(Use.POOL_WINDOW, self.seed, *key)
        row = int(self.rows[key[2]])
        sheet, x, y = self.store.windows[row].tolist()
        height, width = self.store.sheets[sheet]["shape"][:2]
        reach, stride = self.store.side, self.store.index["parameters"]["stride"]
        x = shift(rng, x, reach, reach, stride, width)
        y = shift(rng, y, reach, reach, stride, height)
        weak, _ = resize(self._cut(sheet, x, y, reach), np.empty((0, 4)), self.side)

        exponent = rng.uniform(-1, 1) * (rng.random() < 0.5)
        wide = round(reach / float(np.exp(exponent * np.log1p(self.augment.scale))))
        left, top = (
            int(np.clip(start + (reach - wide) // 2, 0, max(0, most - wide)))
            for start, most in ((x, width), (y, height))
        )
        strong, _ = resize(self._cut(sheet, left, top, wide), np.empty((0, 4)), self.side)
        # The origin of the first window and a point to its right and one below it, as they lie in the second.
        points = np.array([[0, 0], [reach, 0], [0, reach]]) + np.array([x - left, y - top])
        ends = np.tile(points * (self.side / wide), 2)
        strong, ends = turn(strong, ends, rng, self.augment.flip, self.augment.rot90)
        strong = erase(strong, self._paper(row, strong), rng)
        strong = photometric(strong, rng, min(1.0, 2 * self.augment.photometric))
        return {
            "weak": as_tensor(weak),
            "strong": as_tensor(strong),
            "matrix": _matrix(ends[:, :2], self.side),
            "jitter": torch.from_numpy(rng.uniform(-JITTER, JITTER, (JITTERED, 4)).astype(np.float32)),
            "seed": int(rng.integers(2**31)),
            "truth": self._truth(sheet, x, y, reach),
        }

    def _cut(self, sheet: int, x: int, y: int, side: int) -> Image:
        return to_color(self.store.cut(sheet, x, y, side), self.color_mode)

    def _paper(self, row: int, window: Image) -> Color | Image:
        """The color of a window's paper, or an image with that at each place where a sheet is uneven."""
        if self.store.tolerance(row) is not None:
            return nearby_paper(window)
        paper = self.store.paper(row)  # a gray sheet's is a number whatever the mode
        return (paper,) * 3 if window.ndim == 3 and isinstance(paper, int) else paper

    def _truth(self, sheet: int, x: int, y: int, reach: int) -> dict[str, Tensor] | None:
        labelled = self.known.get(self.store.sheet_names[sheet])
        if labelled is None:
            return None
        single = ~labelled.crowd
        boxes, labels = crop_boxes(labelled.boxes[single], labelled.labels[single], x, y, reach, KEEP)
        boxes = (boxes * (self.side / reach)).astype(np.float32)
        return {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels - 1)}


def erase(window: Image, paper: Color | Image, rng: np.random.Generator) -> Image:
    """Lay up to PATCHES rectangles of paper over a window [S, S] or [S, S, 3] (as in arXiv 1708.04896).

    They are smaller than most symbols: what a teacher sees whole stays there in part.
    """
    window, side = window.copy(), len(window)
    for _ in range(int(rng.integers(PATCHES + 1))):
        width, height = (max(1, round(side * rng.uniform(*PATCH))) for _ in range(2))
        x, y = int(rng.integers(side - width + 1)), int(rng.integers(side - height + 1))
        here = np.s_[y : y + height, x : x + width]
        window[here] = paper[here] if isinstance(paper, np.ndarray) else paper
    return window


def _matrix(ends: np.ndarray, side: int) -> Tensor:
    """The affine map [2, 3] that takes (0, 0), (side, 0) and (0, side) to `ends` [3, 2]."""
    axes = (ends[1:] - ends[0]).T / side
    return torch.from_numpy(np.column_stack([axes, ends[0]]).astype(np.float32))


def collate(items: Sequence[Any]) -> tuple:
    """A batch of labelled windows, and behind it one of unlabelled ones if there are any.

    See `data.collate` for the first. The second is a dict with the tensors of `UnlabelledWindows` stacked,
    and lists of seeds and truths.
    """
    pool = [item for item in items if isinstance(item, dict)]
    own = [item for item in items if not isinstance(item, dict)]
    labelled = collate_labelled(own) if own else ()  # none where a sample is measured
    if not pool:
        return labelled
    stacked = {name: default_collate([item[name] for item in pool]) for name in ("weak", "strong", "matrix")}
    stacked["jitter"] = torch.stack([item["jitter"] for item in pool])
    return *labelled, {**stacked, **{name: [item[name] for item in pool] for name in ("seed", "truth")}}


@dataclass(frozen=True)
class Both:
    """The samples of labelled windows and of unlabelled ones, whose keys have a fourth number."""

    labelled: TrainingWindows
    pool: UnlabelledWindows

    def __getitem__(self, key: Any) -> Any:
        return self.labelled[key] if len(key) == 3 else self.pool[key[:3]]

    def source(self, key: Any) -> str:
        return self.labelled.source(key) if len(key) == 3 else self.pool.source(key[:3])


@dataclass(frozen=True)
class TaughtBatches(Batches):
    """Batches of labelled windows that from batch `begin` on have a batch of unlabelled ones beside them.

    One loader makes both, so that no more workers compete for the cores.
    """

    pool: Batches | None = None
    begin: int = 0

    def keys(self, first: int, last: int) -> Iterator[list[Key]]:
        assert self.pool
        beside = self.pool.keys(max(first, self.begin), last)
        for number, keys in enumerate(super().keys(first, last), start=first):
            # Before the others, as room in shared memory is measured by the first, and these are larger.
            pool = [(*key, 0) for key in next(beside)] if number >= self.begin else []
            yield [*pool, *keys]  # type: ignore[list-item]

    def between(self, first: int, last: int, offset: int = 0) -> Any:
        return super(TaughtBatches, replace(self, begin=self.begin + offset)).between(first, last, offset)

    def _measure(self, batch: int) -> int:
        return super()._measure(max(batch, self.begin))


def beside(
    batches: Batches,
    windows: TrainingWindows,
    spec: Spec,
    splits: Sequence[Split],
    folder: Path,
    size: int,
    store_dir: Path,
) -> tuple[TaughtBatches, str]:
    """Batches with `size` unlabelled windows beside each, over all ranks together; lines for the log.

    windows: of the batches; the unlabelled ones are drawn and changed as they are. spec: of the detector.
    splits: with the sheets that are trained on or validated with; those of the pool that are the same files
    are left out. folder: with the pool's sheets, which rank 0 packs into a folder of `store_dir` that runs
    with the same windows share. Labels there measure pseudo-labels and do nothing else. Raises DataError
    if no sheet can be read or none is left.
    """
    labelled = [sheet.file for split in splits for sheet in split.sheets]
    place, left_out = distributed.on_main(
        lambda: (pack(folder, spec, store_dir).folder, same_sheets(find_sheets(folder), labelled))
    )
    store = WindowStore(place)
    known, measured = known_labels(folder, spec)
    pool = UnlabelledWindows(
        store, spec.window, spec.color_mode, windows.seed, windows.augment, left_out, known
    )
    told = [f"unlabelled: {len(pool)} windows of {len(store.sheets) - len(left_out)} sheets, {size} a step"]
    if left_out:
        told.append(f"{len(left_out)} sheets of {folder} are among the labelled ones and left out")
    told += [*(f"skipped {line}" for line in store.skipped), measured]

    per_epoch = max(1, len(pool) // size)
    others = Batches(pool, lambda epoch: pool.order(epoch, size), per_epoch, size, batches.world)
    own = {**vars(batches), "samples": Both(windows, pool), "collate": collate}
    return TaughtBatches(**own, pool=others), "\n".join(told)


def pack(folder: Path, spec: Spec, store_dir: Path) -> WindowStore:
    """The windows of a folder of sheets that suit a detector, packed in a folder of `store_dir`.

    Raises DataError if no sheet can be read or none holds ink.
    """
    reach, stride = (round(length / spec.scale) for length in (spec.window, spec.window - spec.overlap))
    return build_store(folder, store_dir, reach, stride, color_mode=spec.color_mode, shared=True)


def same_sheets(sheets: Sequence[Sheet], others: Sequence[Sheet]) -> set[str]:
    """The names of the sheets that are also among `others`: the same page of a file with the same bytes."""

    def size(sheet: Sheet) -> int:
        return sheet.path.stat().st_size if sheet.path.exists() else -1  # a link that leads nowhere

    sizes = defaultdict(set)
    for other in others:
        sizes[size(other)].add(other)
    digests: dict[Path, str] = {}

    def mark(sheet: Sheet) -> tuple[str, int | None]:
        if sheet.path not in digests:
            digests[sheet.path] = hashlib.sha256(sheet.path.read_bytes()).hexdigest()
        return digests[sheet.path], sheet.page

    same = [sheet for sheet in sheets if size(sheet) in sizes]
    theirs = {mark(other) for sheet in same for other in sizes[size(sheet)]}
    return {sheet.name for sheet in same if mark(sheet) in theirs}


def known_labels(folder: Path, spec: Spec) -> tuple[dict[str, LabelledSheet], str]:
    """The sheets in a folder that have labels, by name, with the detector's labels; a line for the log."""
    if not (folder / ANNOTATIONS).is_file():
        return {}, f"{folder} has no labels of its own: how good the teacher's are is not measured"
    try:
        matched = match_classes(spec.categories, read_split(folder))
    except DataError as error:
        return {}, f"the labels of {folder} measure nothing: {error}"
    own = np.zeros(1 + len(matched.split.categories), np.int64)
    own[matched.labels] = np.arange(len(matched.labels))
    sheets = {s.file.name: replace(s, labels=own[s.labels]) for s in matched.split.sheets}
    return sheets, f"{folder} has labels: they measure the teacher's, nothing is trained on them"
