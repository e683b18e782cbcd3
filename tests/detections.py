"""What several test files measure: truth and detections as COCO has them, and whether two matches agree."""

from dataclasses import fields

import numpy as np

from detection.metrics.matching import Matches

CLASSES = (3, 7, 41)


def truth_of(*sheets):
    """A ground truth from lists of (class, x, y, width, height), one list a sheet; ids are 10, 20, ..."""
    truth: dict[str, list] = {
        "images": [{"id": 10 * (n + 1), "width": 800, "height": 800} for n in range(len(sheets))],
        "categories": [{"id": number, "name": f"class {number}"} for number in CLASSES],
        "annotations": [],
    }
    for n, boxes in enumerate(sheets):
        for number, *bbox in boxes:
            truth["annotations"].append({"image_id": 10 * (n + 1), "category_id": number, "bbox": bbox})
    return truth


def found(sheet, number, score, *bbox):
    return {"image_id": sheet, "category_id": number, "bbox": list(bbox), "score": score}


def jittered(seed, sheets=8, crowd=False, ties=False, most=14):
    """Random truth, and detections that are moved truth, wrong classes, doubles and noise."""
    rng = np.random.default_rng(seed)
    truth, detections = truth_of(*[[] for _ in range(sheets)]), []

    def add(sheet, number, box):
        score = float(rng.random())
        detections.append(found(sheet, int(number), round(score, 1) if ties else score, *map(float, box)))

    for image in truth["images"][1:]:
        for _ in range(int(rng.integers(0, most))):
            number, box = int(rng.choice(CLASSES[:2])), [*rng.uniform(0, 600, 2), *rng.uniform(10, 120, 2)]
            row = {"image_id": image["id"], "category_id": number, "bbox": [float(v) for v in box]}
            truth["annotations"].append({**row, "iscrowd": int(crowd and rng.random() < 0.2)})
            for _ in range(int(rng.integers(0, 3))):
                said = rng.choice(CLASSES) if rng.random() < 0.2 else number
                add(image["id"], said, np.array(box) + rng.normal(0, 4, 4) * (rng.random() < 0.9))
        add(image["id"], rng.choice(CLASSES), [*rng.uniform(0, 600, 2), 50, 50])
    return truth, detections


def random_set(seed, sheets=6, classes=4, crowd=False):
    """Truth on sheets of 400 px and detections that are jittered truth, doubles and noise; scores differ."""
    rng = np.random.default_rng(seed)
    ids = [3, 7, 41, 90, 1000][:classes]
    truth = {
        "info": {},
        "images": [{"id": 10 * (n + 1), "width": 400, "height": 400} for n in range(sheets)],
        "categories": [{"id": i, "name": f"class {i}"} for i in ids],
        "annotations": [],
    }
    detections = []

    def add(image, category, box):
        score = float(rng.random())
        bbox = [float(v) for v in box]
        detections.append({"image_id": image, "category_id": category, "bbox": bbox, "score": score})

    for image in truth["images"][1:]:  # the first sheet stays empty
        for _ in range(int(rng.integers(0, 12))):
            category = int(rng.choice(ids))
            box = [*rng.uniform(0, 300, 2), *rng.uniform(8, 150, 2)]
            annotation = {
                "id": len(truth["annotations"]) + 1,
                "image_id": image["id"],
                "category_id": category,
                "bbox": [float(v) for v in box],
                "area": float(box[2] * box[3]),
                "iscrowd": int(crowd and rng.random() < 0.2),
            }
            truth["annotations"].append(annotation)
            for _ in range(int(rng.integers(0, 3))):
                add(image["id"], category, np.array(box) + rng.normal(0, 3, 4))
        for _ in range(int(rng.integers(0, 4))):
            add(image["id"], int(rng.choice(ids)), [*rng.uniform(0, 300, 2), *rng.uniform(8, 90, 2)])
    return truth, detections


def perfect(truth, score=0.9):
    """The truth itself as detections."""
    return [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": score}
        for a in truth["annotations"]
    ]


def grid_set(count, side=20, pitch=25, first_id=1):
    """One sheet, one class, `count` equal boxes on a grid."""
    columns = 25
    boxes = [[float(pitch * (n % columns)), float(pitch * (n // columns)), side, side] for n in range(count)]
    return {
        "info": {},
        "images": [{"id": 1, "width": 700, "height": 700}],
        "categories": [{"id": 1, "name": "relay"}],
        "annotations": [
            {
                "id": first_id + n,
                "image_id": 1,
                "category_id": 1,
                "bbox": box,
                "area": side * side,
                "iscrowd": 0,
            }
            for n, box in enumerate(boxes)
        ],
    }


def check_same_matches(one: Matches, other: Matches):
    """Every field, and every bit of every array."""
    parts = ("truth", "found", "pairs")
    for whole, same in ((one, other), *((getattr(one, name), getattr(other, name)) for name in parts)):
        for field in fields(whole):
            left, right = getattr(whole, field.name), getattr(same, field.name)
            if isinstance(left, np.ndarray):
                assert left.dtype == right.dtype and np.array_equal(left, right), field.name
            elif field.name not in parts:
                assert left == right, field.name
