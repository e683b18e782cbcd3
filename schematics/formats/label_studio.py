"""Label Studio: a json list of tasks, as it exports them ("JSON", "JSON-MIN") and as it imports predictions.

https://labelstud.io/guide/task_format and https://labelstud.io/guide/predictions. Its exports in COCO and
YOLO are read as these are.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

from schematics.formats.source import (
    IMAGE_SUFFIXES,
    LARGEST,
    Box,
    Labelled,
    Tree,
    assign,
    box_between,
    class_name,
    extent,
    read_text,
)
from schematics.rows import Tally, finite, printable, whole_number
from schematics.sheets import DataError, Sheet
from schematics.uploads import served_path

IMAGES = "images"  # the folder of the sheets in what `write` makes
# Percent has this many digits behind the point: on a sheet of 20,000 px they are 2e-7 px.
DIGITS = 9
# What <Rectangle>, <Polygon> or <Ellipse> gives beside <Labels>, where the region comes again with its label.
BARE = ("rectangle", "polygon", "ellipse")
NO_ANNOTATION = "task without an annotation (a prediction is no label: submit it)"


def is_there(tree: Tree) -> bool:
    return any(_tasks(path) for path in tree.files if path.suffix.lower() == ".json")


def read(tree: Tree, tally: Tally) -> tuple[dict[int, str], list[Labelled]]:
    """Classes by id, numbered in the order of their names, and the sheets that someone has annotated.

    A task that was submitted without a box is a sheet without boxes. Predictions are no labels. Raises
    DataError for bad json and for an image that two tasks label.
    """
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    waiting: dict[Path | str, str] = {}  # what has no annotation, and why
    for path in (path for path in tree.files if path.suffix.lower() == ".json"):
        for task in _tasks(path):
            name, image = _image(tree, task, tally)
            annotation, reason = _annotation(task, tree.name(image) if image else name, tally)
            if annotation is None:
                waiting[image or name] = reason
            elif image is None:
                tally["image that is not there (put the sheets beside the export)", name, "dropped"] += 1
            elif image in found:
                both = " and ".join(sorted({found[image][0].name, path.name}))
                raise DataError(f"{image}: labelled by two tasks, in {both}; keep one of them")
            else:
                found[image] = path, annotation
    for place, reason in waiting.items():
        if place not in found:
            tally[reason, tree.name(place) if isinstance(place, Path) else place, "dropped"] += 1
    for image in set(tree.images) - set(found) - set(waiting):
        tally["image that no task names", tree.name(image), "dropped"] += 1
    splits = assign(tree, found, {}, tally)
    sheets = []
    for image, split in splits.items():
        if size := tree.usable_size(image, tally):
            results = found[image][1]["result"]
            boxes, labelled = _boxes(results, size, split, tree.name(image), tally)
            sheets.append(Labelled(Sheet(image), split, labelled, boxes))
    classes = sorted({box.name for sheet in sheets for box in sheet.boxes})
    return dict(enumerate(classes, start=1)), sheets


def _tasks(path: Path) -> list[dict[str, Any]]:
    """The tasks in a json file, in the form of the export "JSON"; [] where it is no list of tasks.

    Raises DataError if the file begins like one and is broken.
    """
    if path.stat().st_size > LARGEST or not path.stat().st_size:
        return []
    text = read_text(path)
    if not text.lstrip().startswith("[") or not ("labels" in text or '"annotations"' in text):
        return []
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON ({error}); export it again") from None
    tasks = [_whole_task(row) for row in rows if isinstance(row, dict)]
    return [task for task in tasks if task]


def _whole_task(row: dict[str, Any]) -> dict[str, Any] | None:
    """The row if it is a task. One of JSON-MIN, whose regions and data stand side by side, becomes one."""
    known = {"annotations", "predictions", "completions"} & set(row)
    if isinstance(row.get("data"), dict) and known:
        return row
    regions = [value for value in row.values() if isinstance(value, list) and value and _regions(value)]
    if regions or "annotation_id" in row:
        results = [
            {"type": kind, "value": region, **region}
            for region in (region for value in regions for region in value)
            if (kind := next((key for key in region if key.endswith("labels")), ""))
        ]
        data = {key: value for key, value in row.items() if isinstance(value, str)}
        return {"data": data, "annotations": [{"result": results}]}
    return None


def _regions(values: list) -> bool:
    return all(isinstance(v, dict) and any(str(key).endswith("labels") for key in v) for v in values)


def _image(tree: Tree, task: dict[str, Any], tally: Tally) -> tuple[str, Path | None]:
    """What a task calls its image, and the image, if it is there."""
    values = [value for value in task["data"].values() if isinstance(value, str)]
    paths = [path for value in values if (path := served_path(value)).lower().endswith(IMAGE_SUFFIXES)]
    upload = task.get("file_upload")
    names = [*paths, *([upload] if isinstance(upload, str) else [])]
    names += [path.rpartition("/")[2] for path in paths]  # the tool's folders may not be those here
    found = (image for name in names if name and (image := tree.find_upload(name, tally)))
    return printable((names or ["a task without an image"])[0][:200]), next(found, None)


def _annotation(task: dict[str, Any], where: str, tally: Tally) -> tuple[dict[str, Any] | None, str]:
    """The annotation of a task that counts, or None and the reason.

    It is the one that is called the ground truth, or else the newest. Skipped ones never count.
    """
    rows = task.get("annotations", task.get("completions"))
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    done = [row for row in rows if not (row.get("was_cancelled") or row.get("skipped"))]
    kept = [row for row in done if isinstance(row.get("result"), list)]
    if not kept:
        return None, "task that was skipped" if rows else NO_ANNOTATION
    truth = [row for row in kept if row.get("ground_truth") is True] or kept

    def age(row: dict[str, Any]) -> tuple[str, int]:
        return str(row.get("updated_at") or row.get("created_at") or ""), whole_number(row.get("id")) or 0

    if len(kept) > 1:
        kind = "several annotations of a task: the ground truth" if truth != kept else ""
        tally[kind or "several annotations of a task: the newest", where, "repaired"] += 1
    return max(truth, key=age), ""


def _boxes(
    results: list, size: tuple[int, int], split: str, where: str, tally: Tally
) -> tuple[list[Box], tuple[int, int]]:
    """The upright boxes of an annotation, and the size of the sheet that they refer to."""
    boxes = []
    regions = [result for result in results if isinstance(result, dict)]
    with_label = {region.get("id") for region in regions if str(region.get("type")).endswith("labels")}
    for region in regions:
        kind = str(region.get("type"))[:40]
        if kind in BARE and region.get("id") in with_label:
            continue
        try:
            value = region["value"]
            name, *more = (class_name(one) for one in value[kind])
            sides = [whole_number(region.get(f"original_{side}")) or 0 for side in ("width", "height")]
            size = (sides[0], sides[1]) if min(sides) > 0 else size
            boxes.append(box_between(name, _corners(value, size), where, tally))
        except (ValueError, TypeError, KeyError, OverflowError):
            tally[f"region without a label and an area ({printable(kind)!r})", where, "dropped"] += 1
            continue
        if more:
            tally["region with several labels: the first taken", where, "repaired"] += 1
        if finite(value.get("rotation")):
            tally[f"{split}: box turned by an angle: the upright box around it", where, "repaired"] += 1
        if finite(region.get("image_rotation")):
            tally["box on a sheet that was turned in the tool: look at it", where, "kept"] += 1
    return boxes, size


def _corners(value: Mapping[str, Any], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x0, y0, x1, y1 of the upright box around a region, in px. Raises ValueError if it surrounds nothing.

    Sides are percent of the sheet's width and height. A turned rectangle is turned clockwise about its first
    corner, in pixels.
    """
    across, down = size[0] / 100, size[1] / 100
    if "points" in value:
        return extent([(_number(x) * across, _number(y) * down) for x, y in value["points"]])
    x, y = _number(value["x"]) * across, _number(value["y"]) * down
    turn = math.radians(finite(value.get("rotation")) or 0)
    cos, sin = math.cos(turn), math.sin(turn)
    if "radiusX" in value:
        rx, ry = _number(value["radiusX"]) * across, _number(value["radiusY"]) * down
        half, tall = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
        return x - half, y - tall, x + half, y + tall
    width, height = _number(value["width"]) * across, _number(value["height"]) * down
    if not turn:
        return x, y, x + width, y + height
    corners = ((0, 0), (width, 0), (0, height), (width, height))
    return extent([(x + a * cos - b * sin, y + a * sin + b * cos) for a, b in corners])


def _number(value: object) -> float:
    number = finite(value)
    if number is None:
        raise ValueError("no finite number")
    return number


def write(folder: Path, sheets: Sequence[Labelled], names: Mapping[int, str], model: str) -> None:
    """Write `folder`/tasks.json, with the boxes as predictions, and label_config.xml, the interface to paste.

    The sheets lie in `folder`/images. Tasks name them as label-studio/images/NAME, which Label Studio serves
    when the folder above is the root of its local files. A prediction's score is the least of its boxes', and
    0 if it has none: Label Studio can show the least sure sheets first.
    """
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in names.values())
    interface = (
        '<View>\n  <Image name="image" value="$image" zoom="true"/>\n'
        f'  <RectangleLabels name="label" toName="image">\n{labels}  </RectangleLabels>\n</View>\n'
    )
    (folder / "label_config.xml").write_text(interface, encoding="utf-8")
    tasks = [_task(sheet, model) for sheet in sheets]
    (folder / "tasks.json").write_text(json.dumps(tasks, ensure_ascii=False), encoding="utf-8")


def _task(sheet: Labelled, model: str) -> dict[str, Any]:
    width, height = sheet.size
    results = []
    for number, box in enumerate(sheet.boxes, start=1):
        sides = {"x": (box.x, width), "y": (box.y, height), "width": (box.width, width)}
        sides["height"] = (box.height, height)
        percent = {side: round(100 * part / whole, DIGITS) for side, (part, whole) in sides.items()}
        region = {
            "id": f"box{number}",
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": width,
            "original_height": height,
            "image_rotation": 0,
            "value": {**percent, "rotation": 0, "rectanglelabels": [box.name]},
        }
        results.append({**region, **box.columns})
    score = min((box.columns.get("score", 0.0) for box in sheet.boxes), default=0.0)
    image = f"/data/local-files/?d={quote(f'label-studio/{IMAGES}/{sheet.sheet.path.name}')}"
    prediction = {"model_version": model, "score": score, "result": results}
    return {"data": {"image": image}, "predictions": [prediction]}
