"""Export a detector to ONNX; the file is only written if it finds what torch finds on your sheets.

    pip install 'linework[onnx]'
    python -m detection.export --checkpoint OUT/model.pt --out detector.onnx SHEETS

The graph takes one window, uint8 [3, S, S], and returns boxes float32 [N, 4] in its pixels, scores [N] and
labels int64 [N], highest score first. What else inference needs (window, overlap, classes, thresholds) is in
the model's property "linework" as JSON. `detection.predict` and `evaluate.py` take the file as --checkpoint.

On two x86-64 cores with OMP_NUM_THREADS=1, the detector of `make demo` (ResNet-18, windows of 256 px) takes
30 s with the demo's 16 test sheets of 512 x 512 px to compare on. The 751 detections there differ by at most
6e-05 px and 5e-06 in score, and the file has 78 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from cluster import atomic
from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from schematics.sheets import find_sheets, read_sheet


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    # Detector to export: model.pt of a finetuning.
    checkpoint: Path = setting(Path("checkpoints/detector/model.pt"), exists=True)
    # File to write, such as detector.onnx.
    out: Path
    # Drawings on which torch and onnxruntime must agree: image files, PDFs, folders of them.
    sheets: Positional[tuple[Path, ...]] = ()


def main(config: ExportConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.inference import detect, load_detector
    from detection.model import Detector
    from detection.onnx_detector import OnnxDetector
    from detection.onnx_export import LEAST_SCORE, compare, to_onnx

    if not config.sheets:
        raise UserError("name the sheets on which the file is compared with torch, after the flags")
    if config.out.suffix != ".onnx":
        raise UserError(f"--out {config.out}: give a name that ends in .onnx")
    sheets = [sheet for path in config.sheets for sheet in find_sheets(path)]
    detector = load_detector(config.checkpoint, precision="fp32")  # in which the exported one computes
    if not isinstance(detector, Detector):
        raise UserError(f"--checkpoint {config.checkpoint}: already exported; give a model.pt")
    atomic.make_folder(config.out.parent)
    # The file has another name until it has been found to agree with torch.
    trial = config.out.with_name(f".{config.out.name}.trial")
    try:
        atomic.replace(trial, lambda file: file.write(to_onnx(detector)), hashed=True)
        exported, shown, alone, pixels, scores = OnnxDetector(trial), 0, 0, 0.0, 0.0
        for image in map(read_sheet, sheets):
            pair = detect(detector, image), detect(exported, image)
            for one, other in (pair, pair[::-1]):
                missing, apart, off = compare(one, other)
                alone, pixels, scores = alone + missing, max(pixels, apart), max(scores, off)
            shown += int((pair[0].scores >= LEAST_SCORE).sum())
        if not shown:
            raise UserError(
                f"{config.out}: not written, torch finds nothing on the sheets with a score of {LEAST_SCORE} "
                "or more; name sheets with symbols"
            )
        if alone:
            raise UserError(
                f"{config.out}: not written, {alone} detections of {len(sheets)} sheets are found by only "
                "one of torch and onnxruntime; try another version of onnxruntime"
            )
        atomic.replace(config.out, lambda file: file.write(trial.read_bytes()), hashed=True)
    finally:
        trial.unlink(missing_ok=True)
        atomic.sidecar(trial).unlink(missing_ok=True)
    print(
        f"{config.out}: agrees with torch on {len(sheets)} sheets: their {shown} detections with a score of "
        f"{LEAST_SCORE} or more differ by at most {pixels:.1g} px and {scores:.1g} in score"
    )


if __name__ == "__main__":
    run(ExportConfig, main)
