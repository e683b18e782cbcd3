"""Run by round_trip.py in a virtual environment of its own: `python export.py LAID WORK`."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

from datumaro.components.dataset import Dataset
from label_studio_sdk.converter import Converter

laid, work = map(Path, sys.argv[1:])
data = work / "coco-for-datumaro"  # in the layout that Datumaro reads
shutil.copytree(laid / "coco", data / "images")
(data / "annotations").mkdir()
os.rename(data / "images/_annotations.coco.json", data / "annotations/instances_default.json")
for form, source in (("cvat", laid / "cvat"), ("coco", data)):
    loaded = Dataset.import_from(str(source), form)
    for export in ("cvat", "yolo", "coco_instances"):
        loaded.export(str(work / f"datumaro: {form} to {export}"), export, save_media=True)

tasks = json.loads((laid / "label-studio/tasks.json").read_text(encoding="utf-8"))
for number, task in enumerate(tasks, start=1):
    result = copy.deepcopy(task["predictions"][0]["result"])
    task |= {"id": number, "annotations": [{"id": number, "created_at": "2026-01-01", "result": result}]}
(work / "submitted.json").write_text(json.dumps(tasks), encoding="utf-8")
interface = (laid / "label-studio/label_config.xml").read_text(encoding="utf-8")
for export in ("JSON", "JSON_MIN", "COCO", "YOLO"):
    converter = Converter(interface, project_dir=str(work), download_resources=False)
    folder = work / f"label-studio-sdk: json to {export}"
    converter.convert(str(work / "submitted.json"), str(folder), export, is_dir=False)
    shutil.copytree(laid / "label-studio/images", folder / "images", dirs_exist_ok=True)
