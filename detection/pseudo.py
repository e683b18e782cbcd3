"""Draw a picture of what the teacher of a run makes of unlabelled windows.

    python -m detection.pseudo --run OUT --out pseudo.png

OUT is the exp-dir of a finetuning with --unlabeled, finished or not; its newest checkpoint is shown. Each
window is there twice: as the teacher sees it, with all its boxes and their scores, and to the right as the
student sees it, with what it is told. Green boxes are sure and exact, orange ones sure, gray ones neither.
True boxes, where the pool has labels, are thin and blue.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError

if TYPE_CHECKING:
    from detection.teaching import Teaching
    from detection.unlabeled import UnlabelledWindows

EXACT, SURE, UNSURE, TRUE, LINE = (0, 150, 60), (230, 120, 0), (150, 150, 150), (60, 90, 230), (90, 90, 200)
COLUMNS = 2  # pairs in a row
LEAST = 400  # px, to which smaller windows are enlarged


@dataclass(frozen=True, kw_only=True)
class PseudoConfig(Config):
    # Exp-dir of a finetuning with --unlabeled.
    run: Path = setting(Path("checkpoints/detector"), exists=True)
    # Picture to write, a PNG.
    out: Path = Path("pseudo.png")
    # Windows in the picture.
    count: int = setting(8, least=1)
    # Number from which the windows are drawn.
    seed: int = setting(0, least=0)


def main(config: PseudoConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.draw import write_png

    if not config.out.parent.is_dir():
        raise UserError(f"--out {config.out}: there is no folder {config.out.parent}")
    teaching, pool, step = read_teacher(config.run, config.seed)
    names = [name for _, name in teaching.teacher.spec.categories]
    chosen = pool.order(0, config.count)[: config.count].tolist()
    cells = [_pair(teaching, pool[0, n, row], names) for n, row in enumerate(chosen)]
    blank = [np.full_like(cells[0], 255)] * (-len(cells) % COLUMNS)
    rows = [np.hstack((cells + blank)[n : n + COLUMNS]) for n in range(0, len(cells), COLUMNS)]
    write_png(config.out, np.vstack(rows))
    least = teaching.thresholds.tolist()
    print(f"{config.out}: {len(cells)} windows, step {step}, thresholds {min(least):.2f} to {max(least):.2f}")


def read_teacher(exp_dir: Path, seed: int) -> tuple[Teaching, UnlabelledWindows, int]:
    """The teacher in the newest checkpoint of a run, its pool's windows as `seed` draws them, and the step.

    Raises UserError for a folder without such a checkpoint.
    """
    from cluster import checkpoint
    from detection.data import Augment
    from detection.model import Detector
    from detection.spec import Spec
    from detection.teaching import Teaching
    from detection.unlabeled import UnlabelledWindows, known_labels, pack

    path, saved, _ = checkpoint.load_newest(exp_dir / "checkpoints")
    if path is None or "teacher" not in saved:
        raise UserError(
            f"--run {exp_dir}: no checkpoint of a finetuning with --unlabeled; give its --exp-dir"
        )
    try:
        flags = json.loads((exp_dir / "config.json").read_text())
        folder = Path(flags["unlabeled"])
        store_dir = Path(flags["store_dir"] or exp_dir.parent)
        changes = {name: flags[name] for name in ("photometric", "flip", "rot90")}
        augment = Augment(shift=True, scale=flags["scale_jitter"], **changes)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{exp_dir}/config.json: not a run's ({error}); give another --run") from None
    spec = Spec.from_dict(saved["spec"], str(path))
    detector = Detector(spec)
    detector.load_state_dict(saved["ema"])
    teaching = Teaching(detector.eval(), 1.0, 1)
    teaching.restore(saved["teacher"], str(path), "give another --run")
    known, _ = known_labels(folder, spec)
    store = pack(folder, spec, store_dir)
    pool = UnlabelledWindows(store, spec.window, spec.color_mode, seed, augment, set(), known)
    return teaching, pool, saved["step"]


def _pair(teaching: Teaching, sample: dict[str, Any], names: list[str]) -> np.ndarray:
    """A window as the teacher sees it and as the student does, RGB, with their boxes."""
    import torch

    identity = torch.eye(2, 3)[None]
    windows, jitter = sample["weak"][None], sample["jitter"][None]
    (found,), (own,) = teaching.label(windows, jitter, identity)
    _, (told,) = teaching.label(windows, jitter, sample["matrix"][None])
    true = sample["truth"]["boxes"] if sample["truth"] else torch.empty(0, 4)
    texts = [
        f"{names[label]} {100 * score:.0f}"
        for label, score in zip(found.labels.tolist(), found.scores.tolist(), strict=True)
    ]
    left = _drawn(sample["weak"], true, own.boxes, own.sure, own.stable, texts)
    right = _drawn(sample["strong"], torch.empty(0, 4), told.boxes, told.sure, told.stable, [])
    framed = np.hstack([left, right])
    return cv2.copyMakeBorder(framed, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=LINE)


def _drawn(window: Any, true: Any, boxes: Any, sure: Any, stable: Any, texts: list[str]) -> np.ndarray:
    """A window uint8 [3, S, S] as RGB with true boxes [M, 4] and a teacher's [N, 4], with texts or none."""
    picture = np.ascontiguousarray(window.permute(1, 2, 0).numpy())
    factor = max(1, -(-LEAST // len(picture)))
    picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)
    for box in (true * factor).round().int().tolist():
        cv2.rectangle(picture, box[:2], box[2:], TRUE, 1)
    for n in reversed(range(len(boxes))):  # the best on top
        color = EXACT if stable[n] else SURE if sure[n] else UNSURE
        x0, y0, x1, y1 = (boxes[n] * factor).round().int().tolist()
        cv2.rectangle(picture, (x0, y0), (x1, y1), color, 2)
        if texts:
            text = texts[n].encode("ascii", "replace").decode()
            cv2.putText(picture, text, (x0, max(10, y0 - 3)), cv2.FONT_HERSHEY_SIMPLEX, 0.38, color, 1)
    return picture


if __name__ == "__main__":
    run(PseudoConfig, main)
