"""Draw splits: by sheet, stratified by class, with sheets that look alike on one side; and shares of one."""

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace

import cv2
import numpy as np

from schematics import draws
from schematics.coco import Split
from schematics.sheets import DataError, Sheet, read_sheet

# Two sheets look alike if their pictures, shrunk to so many pixels a side, correlate above this.
THUMB = 32
ALIKE = 0.99
# Roboflow calls the copies of an image, augmented or not, by its name and a hash.
ROBOFLOW = re.compile(r"(.+)\.rf\.\w+$")


def stratified(
    groups: Sequence[tuple[int, Mapping[str, int]]], shares: Mapping[str, float], seed: int
) -> list[str]:
    """The split for each group, so that all classes come as near to the shares as they can.

    groups: how many sheets each has, and on how many of them each class is. shares: split -> its share of all
    sheets, which sum to 1. The rarest class that is left is dealt out first, each of its groups to the split
    that lacks it most (Sechidis, Tsoumakas, Vlahavas, On the stratification of multi-label data, 2011).
    """
    total = sum(count for count, _ in groups)
    classes = sum((Counter(names) for _, names in groups), Counter())
    order, names_in_order = list(range(len(groups))), sorted(classes)
    random.Random(seed).shuffle(order)
    random.Random(seed).shuffle(names_in_order)  # of classes that are equally rare
    lacks = {split: share * total for split, share in shares.items()}
    lacks_of = {split: {name: share * n for name, n in classes.items()} for split, share in shares.items()}
    drawn: dict[int, str] = {}
    while len(drawn) < len(groups):
        left = [place for place in order if place not in drawn]
        count = Counter(name for place in left for name in groups[place][1])
        rarest = min((name for name in names_in_order if name in count), key=count.__getitem__, default=None)
        # Where no class is left, the sheets without boxes are dealt out.
        for place in (place for place in left if rarest is None or rarest in groups[place][1]):
            size, names = groups[place]
            # A split without room for half of a group gets no more, as long as another one has it.
            room = [s for s in shares if lacks[s] >= size / 2] or [max(shares, key=lacks.__getitem__)]
            split = max(room, key=lambda split: (lacks_of[split].get(rarest or "", 0.0), lacks[split]))
            drawn[place] = split
            lacks[split] -= size
            for name, n in names.items():
                lacks_of[split][name] -= n
    return [drawn[place] for place in range(len(groups))]


def alike(sheets: Sequence[Sheet]) -> list[int]:
    """A number for each sheet, which it shares with those that may show the same drawing.

    These are the pages of one document, files that are byte for byte the same, Roboflow's copies of one
    image, and sheets whose pictures, shrunk to 32 x 32 px, correlate above 0.99. Crops of one drawing are not
    found.
    Raises DataError if a sheet can't be decoded.
    """
    leader = list(range(len(sheets)))

    def first(place: int) -> int:
        while leader[place] != place:
            place = leader[place]
        return place

    seen: dict[Hashable, int] = {}
    thumbs = np.zeros((len(sheets), THUMB * THUMB), np.float32)
    for place, sheet in enumerate(sheets):
        found = ROBOFLOW.match(sheet.path.stem)
        digest = hashlib.sha256(sheet.path.read_bytes()).hexdigest()
        for mark in (sheet.path, digest, found and ("roboflow", found[1])):
            if mark:
                leader[first(place)] = first(seen.setdefault(mark, place))
        image = read_sheet(sheet)
        gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        thumb = cv2.resize(gray, (THUMB, THUMB), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
        thumb -= thumb.mean()
        thumbs[place] = thumb / (np.linalg.norm(thumb) or 1)
    for place in range(1, len(sheets)):
        for other in np.flatnonzero(thumbs[:place] @ thumbs[place] > ALIKE):
            leader[first(place)] = first(int(other))
    return [first(place) for place in range(len(sheets))]


def draw(
    sheets: Sequence[Sheet], classes: Sequence[Sequence[str]], shares: Mapping[str, float], seed: int
) -> list[str]:
    """The split of each sheet: "train" or one of `shares`, which are its shares of the sheets.

    classes: those on each sheet. The same sheets and seed give the same splits, whatever their order.
    Raises DataError if a sheet can't be decoded, or if too few differ for each split to get one.
    """
    order = sorted(range(len(sheets)), key=lambda place: sheets[place].name)
    members = defaultdict(list)
    for place, number in zip(order, alike([sheets[place] for place in order]), strict=True):
        members[number].append(place)
    groups = [
        (len(places), Counter(name for p in places for name in set(classes[p])))
        for places in members.values()
    ]
    wanted = {"train": 1 - sum(shares.values()), **{split: share for split, share in shares.items() if share}}
    drawn = stratified(groups, wanted, seed)
    empty = [split for split in wanted if split not in drawn]
    if empty:
        raise DataError(
            f"too few to draw {', '.join(wanted)}: pages of one document and sheets that look alike stay"
            f" together, and of {len(sheets)} sheets {len(groups)} differ; give larger shares or more sheets"
        )
    split_of = {p: split for places, split in zip(members.values(), drawn, strict=True) for p in places}
    return [split_of[place] for place in range(len(sheets))]


def take_share(split: Split, share: float, seed: int) -> tuple[Split, str]:
    """A share of the split's sheets with the classes of all, and a line for the log ("" for the whole split).

    It has at least one sheet. The same sheets and seed give the same share, and a smaller one is part of it.
    """
    if share == 1:
        return split, ""
    names = [category.name for category in split.categories]
    classes = {s.file_name: {names[label - 1] for label in s.labels[~s.crowd]} for s in split.sheets}
    taken, told = share_of(classes, share, seed, split.name)
    sheets = {sheet.file_name: sheet for sheet in split.sheets}
    return replace(split, sheets=[sheets[name] for name in taken]), told


def share_of(
    classes: Mapping[str, Collection[str]], share: float, seed: int, split: str
) -> tuple[list[str], str]:
    """`take_share` for the classes on each sheet, by its name: the names taken, sorted, and the line."""
    sheets = sorted(classes)
    taken = sorted(nested([classes[name] for name in sheets], seed)[: max(1, round(share * len(sheets)))])
    names = [sheets[place] for place in taken]
    lost = set[str]().union(*classes.values()) - set[str]().union(*(classes[name] for name in names))
    told = f"{split}: {len(names)} of {len(sheets)} sheets, drawn with seed {seed}; "
    told += f"no example left of {', '.join(sorted(lost))}" if lost else "every class has an example"
    return names, told


def nested(classes: Sequence[Collection[str]], seed: int) -> list[int]:
    """An order of the sheets, each beginning of which is a draw by class, of whatever length.

    classes: those on each sheet. The sheets are halved by `stratified`, the first half again, and so on. A
    plain shuffle leaves more classes out: of 31 classes of 1,534 circuits a share of 31 has 23 and not 25.
    Where any sheet shows a class, the first one does.
    """
    rng = draws.draw(draws.Use.TRAINING_SHARE, seed)
    groups = [(1, Counter(dict.fromkeys(names, 1))) for names in classes]
    first, rest = rng.permutation(len(classes)).tolist(), list[int]()
    while len(first) > 1:
        halving = int(rng.integers(2**32))
        sides = stratified([groups[place] for place in first], {"in": 0.5, "out": 0.5}, halving)
        chosen = {place for place, side in zip(first, sides, strict=True) if side == "in"}
        rest = [place for place in first if place not in chosen] + rest
        first = [place for place in first if place in chosen]
    return first + rest
