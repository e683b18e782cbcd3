"""Finetune a Faster R-CNN on labelled sheets, starting from a pretrained backbone.

    python -m detection.finetune --data-dir DATA --backbone EXP/backbone.safetensors --exp-dir OUT

DATA holds train/ and valid/ with COCO annotations; a raw Roboflow export will do. OUT/model.pt is the
detector after the epoch with the best validation AP, OUT/last.pt the one after the last epoch. The same
command again goes on where the run stopped; with another --lr or --scheduler it begins a new phase of the
learning rate there. The recipe is that of arXiv 1911.05722, appendix: all layers are trained, every BatchNorm
is synced over ranks, and mean and std are those of pretraining.

On two x86-64 cores, 320 steps of four windows of 256 px with a ResNet-18 take 6 minutes and reach test AP
0.65 and AP50 0.85 on the synthetic sheets of `make demo`. On 80 real circuits with 31 classes, 300 steps take
6 to 7 minutes of CPU time and reach test AP 0.13 from a pretrained backbone, 0.07 from random weights
(docs/results.md). Training on a GPU has not been measured.
"""

from cluster import entry
from detection.config import FinetuneConfig


def main(config: FinetuneConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.stage import finetune

    finetune(config)


if __name__ == "__main__":
    entry.run(FinetuneConfig, main)
