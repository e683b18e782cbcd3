"""Draw a picture of training windows as finetuning sees them, with their boxes.

    python -m detection.windows --data-dir DATA --out windows.png --paste 4

Its flags are those of `python -m detection.finetune`. Boxes are green, and red those of symbols that --paste
has laid there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from detection.spec import MOST_PIXELS

OWN, PASTED, LINE = (0, 150, 60), (220, 40, 40), (90, 90, 200)  # RGB
COLUMNS = 5


@dataclass(frozen=True, kw_only=True)
class WindowsConfig(Config):
    # Labelled sheets, of which train/ is shown.
    data_dir: Path = setting(Path("data"), exists=True)
    # Picture to write, a PNG.
    out: Path = Path("windows.png")
    # Windows in the picture.
    count: int = setting(20, least=1)
    # Side of a window in pixels; by default fitted to the sheets.
    window: int | None = setting(None, least=64, most=MOST_PIXELS)
    # Size at which sheets are seen, such as 0.5 for half of it.
    scale: float = setting(1.0, least=0.01, most=1)
    # Symbols of other sheets that are laid on a window, at most.
    paste: int = setting(0, least=0)
    # Strength of the scale jitter.
    scale_jitter: float = setting(0.1, least=0)
    # Strength of brightness, contrast, blur and noise, from 0 to 1.
    photometric: float = setting(0.3, least=0, most=1)
    # Mirror windows.
    flip: bool = False
    # Turn windows by quarters.
    rot90: bool = False
    # Number from which the windows and their changes are drawn.
    seed: int = setting(0, least=0)

    @property
    def augmenting(self) -> dict[str, Any]:
        """The arguments of `Augment` that flags set, but for the pasting."""
        named = ("photometric", "flip", "rot90")
        return {"shift": True, "scale": self.scale_jitter, **{name: getattr(self, name) for name in named}}


def main(config: WindowsConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.data import Augment, TrainingWindows
    from detection.draw import write_png
    from detection.plan import fit_color_mode, fit_overlap, fit_window
    from detection.sheets import SheetReader, scale_sheet
    from schematics.coco import find_split, read_split

    if not config.out.parent.is_dir():
        raise UserError(f"--out {config.out}: there is no folder {config.out.parent}")
    split = read_split(find_split(config.data_dir, "train"))
    sheets = [scale_sheet(sheet, config.scale) for sheet in split.sheets]
    side = config.window or fit_window(sheets)
    reader = SheetReader(split, fit_color_mode(sheets), scale=config.scale)
    overlap = fit_overlap(sheets, side)
    plain, pasted = (
        TrainingWindows(reader, side, overlap, config.seed, Augment(paste=paste, **config.augmenting))
        for paste in (0, config.paste)
    )
    order = plain.order(0, config.count)[: config.count].tolist()
    cells = [
        _cell(pasted[key], len(plain[key][1]["boxes"])) for key in ((0, n, k) for n, k in enumerate(order))
    ]
    blank = [np.full_like(cells[0], 255)] * (-len(cells) % COLUMNS)
    rows = [np.hstack((cells + blank)[n : n + COLUMNS]) for n in range(0, len(cells), COLUMNS)]
    write_png(config.out, np.vstack(rows))
    print(f"{config.out}: {len(cells)} windows of {side} px")


def _cell(sample: tuple[Any, dict[str, Any], int], own: int) -> np.ndarray:
    """A window uint8 [3, side, side] as an RGB picture with its boxes, the first `own` of them its own."""
    window, target, _ = sample
    picture = np.ascontiguousarray(window.permute(1, 2, 0).numpy())
    for n, box in enumerate(target["boxes"].round().int().tolist()):
        cv2.rectangle(picture, box[:2], box[2:], OWN if n < own else PASTED, 2)
    return cv2.copyMakeBorder(picture, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=LINE)


if __name__ == "__main__":
    run(WindowsConfig, main)
