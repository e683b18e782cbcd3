"""Sheets with proposed boxes as folders for the tools in which people correct them.

A folder of a tool holds the sheets and the boxes as that tool imports them. What the tool exports is read by
`python -m schematics.convert`.
"""

import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from schematics.folders import refuse_existing, whole_folder
from schematics.formats import coco, cvat, label_studio, yolo
from schematics.formats.source import Box, Labelled
from schematics.sheets import Sheet, read_sheet, sheet_header, write_png

TOOLS = {"label-studio": label_studio, "cvat": cvat, "coco": coco, "yolo": yolo}
# All tools show these as they are. PDF and TIFF they don't, or only the first page.
SHOWN = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def refuse_laid_out(out: Path, tools: Sequence[str]) -> None:
    """Raise DataError if `out` has a folder of one of the tools, in which corrections may lie."""
    for tool in tools:
        refuse_existing(out / tool)


def tool_names(sheets: Sequence[Sheet]) -> list[str]:
    """The file name of each sheet in the tools: plan_page_3.png for page 3 of a PDF, plan-2.png for a second.

    Tools change or refuse other characters than letters, digits, "-", "_" and ".", so these are underscores.
    No two names differ in case or suffix only, since YOLO has one label file for both.
    """
    taken: set[str] = set()
    names = []
    for sheet in sheets:
        page = "" if sheet.page is None else f"_page_{sheet.page}"
        bare = re.sub(r"[^-\w.]", "_", unicodedata.normalize("NFC", sheet.path.stem))
        # File systems allow names of 255 bytes, of which some letters take three or four.
        bare = stem = bare.encode("utf-8")[:150].decode(errors="ignore").lstrip(".") + page
        number = 2
        while stem.casefold() in taken:
            stem, number = f"{bare}-{number}", number + 1
        taken.add(stem.casefold())
        names.append(stem + (sheet.path.suffix.lower() if _is_shown(sheet) else ".png"))
    return names


def _is_shown(sheet: Sheet) -> bool:
    """Whether all tools show the file as `read_sheet` decodes it. They differ about an EXIF turn."""
    return sheet.path.suffix.lower() in SHOWN and sheet_header(sheet)[2] == 1


def lay_out(
    out: Path,
    tools: Sequence[str],
    sheets: Sequence[Labelled],
    names: Mapping[int, str],
    model: str = "linework",
    dpi: int = 200,
) -> list[Path]:
    """Write a folder of each tool, a key of TOOLS, into `out`, whole or not at all, and return them.

    sheets: with their boxes, whose columns may hold a score; a sheet without boxes is a task too. Boxes are
    cut at the sheet's edges. names: all classes by id. model: what made the boxes. dpi: resolution of PDF
    pages. Image files are copied, and no links: some tools mend files in their place. Pages of documents, and
    what a tool would not show as we see it, become PNG. Raises DataError if a folder exists or a sheet can't
    be read.
    """
    refuse_laid_out(out, tools)
    files = tool_names([labelled.sheet for labelled in sheets])
    made: list[Path] = []
    for tool in dict.fromkeys(tools):
        with whole_folder(out / tool) as folder:
            place = folder / TOOLS[tool].IMAGES
            place.mkdir(exist_ok=True)
            laid = []
            for labelled, name in zip(sheets, files, strict=True):
                earlier = made[0] / TOOLS[tools[0]].IMAGES / name if made else None
                _place(labelled.sheet, place / name, earlier, dpi)
                laid.append(replace(labelled, sheet=Sheet(place / name), boxes=_clipped(labelled)))
            TOOLS[tool].write(folder, laid, names, model)
        made.append(out / tool)
    return made


def _place(sheet: Sheet, path: Path, earlier: Path | None, dpi: int) -> None:
    """Put a sheet at `path`. earlier: where it was put for another tool."""
    if earlier or _is_shown(sheet):
        shutil.copyfile(earlier or sheet.path, path)
    else:
        write_png(path, read_sheet(sheet, dpi))


def _clipped(labelled: Labelled) -> list[Box]:
    """The boxes cut at the edges of the sheet, without those of which nothing is left."""
    width, height = labelled.size
    boxes = []
    for box in labelled.boxes:
        x0, x1 = (min(max(x, 0.0), width) for x in (box.x, box.x + box.width))
        y0, y1 = (min(max(y, 0.0), height) for y in (box.y, box.y + box.height))
        if x1 > x0 and y1 > y0:
            boxes.append(replace(box, x=x0, y=y0, width=x1 - x0, height=y1 - y0))
    return boxes
