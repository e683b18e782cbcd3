"""Labels that are probably missing, wrong in class, doubled or badly placed, the most doubtful first.

    python -m detection.doubt --checkpoint OUT/model.pt --out DOUBTS DATA
    python -m detection.doubt --folds 3 --finetune="--preset laptop --backbone none" --out DOUBTS DATA

DATA is a labelled data set or one split of it. A detector judges only sheets that it was not trained on, nor
any that looks like one of those. So give one that was trained on a part of the data (--checkpoint, several
times if there are several), or let --folds train as many as it takes: each on all folds but the one that it
judges then. Interrupted, the same command goes on.

DOUBTS gets doubts.html, a gallery with a crop of each doubt, and doubts.json, the same as a list with the
annotation's id, what the detector suggests, and a score. Nothing is changed in DATA. Where the score comes
from stands in detection/labelling/doubts.py, what it is worth in docs/labelling.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tyro.conf import Positional, UseAppendAction

from cluster import array, atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.labelling.doubt_page import KIND_NAMES, make_cards, write_page
from detection.labelling.doubts import KINDS, Doubt, Judged, find_doubts
from detection.labelling.folds import draw_folds, judges_of, plan, write_folds
from detection.labelling.judges import Desk, judge, lay_out, seen_by, trained_on
from schematics.coco import LabelledSheet, find_splits, losses, read_split


@dataclass(frozen=True, kw_only=True)
class DoubtConfig(Config):
    # Labelled sheets: a data set with train/, valid/ or test/, or one of these.
    data: Positional[Path | None] = None
    # Detector that judges, model.pt of a finetuning; give the flag again for each further one.
    checkpoint: UseAppendAction[tuple[Path, ...]] = ()
    # Train the judges: so many detectors, each on all sheets but the fold that it judges.
    folds: int | None = setting(None, least=2)
    # Flags of detection.finetune for these, in one word: --finetune="--preset laptop --backbone none".
    finetune: str = "--preset laptop"
    # Trainings of folds that run at a time on this machine.
    local: int = setting(1, least=1)
    # Print the trainings of --folds and end.
    dry_run: bool = False
    # Seed by which folds are drawn; the detectors' too, unless --finetune gives one.
    seed: int = setting(0, least=0)
    # Judge sheets that all detectors were trained on, too: their doubts are marked, and weaker.
    seen: bool = False
    # Folder for what is written.
    out: Path = Path("doubts")
    # Replace the doubts of an earlier run in --out.
    overwrite: bool = False
    # Doubts that are written, at most.
    top: int = setting(200, least=1)
    # Windows in one forward pass; memory grows with it.
    batch_size: int = setting(4, least=1)
    # Where to compute: auto (a GPU if there is one), cpu, cuda, or one GPU as cuda:1.
    device: str = "auto"
    # Arithmetic of the network: fp32, bf16, or auto: bf16 if the detector was validated in it, on a machine
    # that computes it faster in it. Boxes and scores are float32.
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def main(config: DoubtConfig) -> None:
    refuse_flags(config.data, config.checkpoint, config.folds, config.out, config.overwrite)
    assert config.data is not None
    splits = [read_split(place) for place in find_splits(config.data)]
    desk, notes = lay_out(splits), [line for split in splits if (line := losses(split))]
    if config.folds:
        folds = draw_folds(desk, config.folds, config.seed)
        homes = write_folds(desk, folds, config.out / "folds")
        runs = plan(homes, config.out, config.finetune, config.seed)
        if config.dry_run:
            print("\n".join(array.line(command) for each in runs for command in each.commands))
            return
        array.run_here(runs, config.out, config.local)
        checkpoints, judges = judges_of(homes, config.out), folds
        seen = np.zeros(len(folds), bool)
    else:
        checkpoints = list(config.checkpoint)
        judges, seen, told = assign(desk, checkpoints, config.seen)
        notes += told
    print("\n".join(notes), end="\n" * bool(notes), flush=True)
    judged, unknown = look_at(desk, judges, checkpoints, config.batch_size, config.device, config.precision)
    if unknown:
        named = ", ".join(f"{name} {number}" for name, number in unknown.items())
        notes.append(f"{sum(unknown.values())} labels of classes that the detector does not know: {named}")
        print(notes[-1])
    doubts = find_doubts(judged)
    places = np.flatnonzero(judges >= 0).tolist()
    labels = sum(int((sheet.given.labels > 0).sum()) for sheet in judged)
    write(config.out, doubts[: config.top], desk, places, seen[places].tolist(), labels, notes, config.data)
    print("\n".join(tell(doubts[: config.top])))
    print(f"{labels} labels on {len(places)} sheets judged; look at {config.out / 'doubts.html'}")


def refuse_flags(
    data: Path | None, checkpoints: Sequence[Path], folds: int | None, out: Path, overwrite: bool
) -> None:
    """Raise UserError unless the flags say who judges what."""
    if data is None:
        raise UserError("name the labelled sheets: python -m detection.doubt --checkpoint MODEL.pt DATA")
    if not checkpoints and not folds:
        raise UserError("who is to judge? give --checkpoint MODEL.pt, or --folds 3 to train the judges")
    if checkpoints and folds:
        raise UserError("--folds trains the detectors that judge: leave out --checkpoint, or --folds")
    if (out / "doubts.json").exists() and not overwrite:
        raise UserError(f"--out {out}: holds doubts; name another folder, or give --overwrite")


def assign(
    desk: Desk, checkpoints: Sequence[Path], also_seen: bool
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """By sheet its judge, int64 [N] (-1: none), and whether that one was trained on it; lines to tell.

    Raises UserError where no sheet is left to judge.
    """
    trained = []
    for checkpoint in checkpoints:
        try:
            trained.append(trained_on(checkpoint))
        except UserError:
            if not also_seen:
                raise
            trained.append(desk.files)
    had = seen_by(desk.files, trained)
    judges, seen = had.argmin(0), np.asarray(had.all(0))
    if not seen.any():
        return judges, seen, []
    them = f"{seen.sum()} of {len(seen)} sheets"
    who = "the detector" if len(checkpoints) == 1 else "each detector"
    if also_seen:
        return judges, seen, [f"{them} were in the training of {who}: their doubts are marked, and weaker"]
    if seen.all():
        raise UserError(
            f"all {len(seen)} sheets were in the training of {who}, which has learnt their faults; give "
            "--folds 3, or --seen to judge all the same"
        )
    judges[seen] = -1
    return judges, seen, [f"{them} were in the training of {who} and are left out; --seen judges them too"]


def look_at(
    desk: Desk, judges: np.ndarray, checkpoints: Sequence[Path], batch_size: int, device: str, precision: str
) -> tuple[list[Judged], dict[str, int]]:
    """What the checkpoints say of the sheets that each of them judges; see `judge`."""
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster import distributed
    from detection.inference import detect, load_detector

    on = distributed.lone_device(device)
    detectors = [load_detector(checkpoint, on, precision) for checkpoint in checkpoints]
    categories = [detector.spec.categories for detector in detectors]
    return judge(desk, judges, categories, lambda number, image: detect(detectors[number], image, batch_size))


def write(
    out: Path,
    doubts: Sequence[Doubt],
    desk: Desk,
    places: Sequence[int],
    seen: Sequence[bool],
    labels: int,
    notes: Sequence[str],
    data: Path,
) -> None:
    """doubts.json and doubts.html. places: in the desk, of the sheets that were judged."""
    sheets = [desk.sheets[place][1] for place in places]
    names = [desk.sheets[place][0].name for place in places]
    rows = [
        {
            "split": names[doubt.sheet],
            "seen": seen[doubt.sheet],
            **as_row(doubt, sheets[doubt.sheet], desk.names),
        }
        for doubt in doubts
    ]
    atomic.make_folder(out)
    document = {"data": str(data), "sheets": len(sheets), "labels": labels, "notes": notes, "doubts": rows}
    cards = make_cards(doubts, sheets, desk.names, seen)
    atomic.write_text(out / "doubts.json", json.dumps(document, indent=1) + "\n")
    write_page(
        out / "doubts.html",
        cards,
        desk.names,
        title=data.resolve().name,
        labels=labels,
        sheets=len(sheets),
        notes=notes,
    )


def as_row(doubt: Doubt, sheet: LabelledSheet, names: Sequence[str]) -> dict[str, Any]:
    """A doubt as JSON has it; boxes are x, y, width, height in pixels of the sheet, absent things null."""

    def xywh(box: Sequence[float]) -> list[float]:
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    there, twin = doubt.label >= 0, doubt.twin >= 0
    return {
        "kind": KINDS[doubt.kind],
        "score": round(doubt.score, 4),
        "sheet": sheet.file_name,
        "image_id": sheet.image_id,
        "annotation_id": int(sheet.annotation_ids[doubt.label]) if there else None,
        "label": doubt.label if there else None,
        "class": names[doubt.given - 1] if doubt.given else None,
        "box": xywh(sheet.boxes[doubt.label].tolist()) if there else None,
        "suggested_class": names[doubt.suggested - 1] if doubt.suggested else None,
        "suggested_box": xywh(doubt.box) if doubt.box else None,
        "twin_annotation_id": int(sheet.annotation_ids[doubt.twin]) if twin else None,
    }


def tell(written: Sequence[Doubt]) -> list[str]:
    """A line a kind."""
    scores = {kind: [doubt.score for doubt in written if doubt.kind == kind] for kind in range(len(KINDS))}
    return [
        f"{name}: {len(scores[kind])}" + (f", scores up to {max(scores[kind]):.2f}" if scores[kind] else "")
        for kind, name in enumerate(KIND_NAMES)
    ]


if __name__ == "__main__":
    run(DoubtConfig, main)
