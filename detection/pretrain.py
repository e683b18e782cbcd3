"""Pretrain a detector's backbone, pyramid, RPN and box head on unlabelled drawings, by the boxes around ink.

    python -m detection.pretrain --unlabeled POOL --backbone EXP/backbone.safetensors --exp-dir OUT
    python -m detection.finetune --data-dir DATA --backbone OUT/pretrained.safetensors --exp-dir FINETUNED

Features of a box agree between two views of a window and across scales (SoCo, arXiv 2106.02637; AlignDet,
arXiv 2307.11077), and the RPN learns to propose the boxes (ADePT, arXiv 2211.09022). The boxes are those of
schematics.ink. The same command again goes on where the run stopped. Finetuning says how many tensors of each
part it has taken; the last layers, for class and box, are new there.

On one of two shared x86-64 cores a step of eight windows of 256 px with a ResNet-18 and a pyramid of 128
channels took 3 to 4 s when the other was idle; docs/results.md says what it was worth. Training on a GPU has
not been measured.
"""

from cluster import entry
from detection.pretrain_config import InkConfig


def main(config: InkConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from detection.pretrain_stage import pretrain_detector

    pretrain_detector(config)


if __name__ == "__main__":
    entry.run(InkConfig, main)
