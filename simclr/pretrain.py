"""Pretrain a backbone on unlabelled drawings by SimCLR (Chen et al. 2020, arXiv 2002.05709).

    python -m simclr.pretrain --data-dir DRAWINGS --exp-dir checkpoints/simclr

Leaves backbone.safetensors in the exp-dir for detection.finetune. The same command again goes on where it
stopped.
ResNet-50, batch 256, lr 0.3 * 256 / 256 with 10 epochs of warm-up and a cosine to 0, projector 2048-128 with
BatchNorm on each layer, temperature 0.1. Times and figures: docs/results.md.
"""

from dataclasses import dataclass
from functools import partial

from cluster.config import refuse_outside, run
from pretraining.config import PretrainConfig
from pretraining.stage import pretrain
from schematics.sheets import DataError
from simclr.loss import nt_xent


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(PretrainConfig):
    # Widths of the projector's layers.
    projector: tuple[int, ...] = (2048, 128)
    # tau of NT-Xent, in units of cosine similarity.
    temperature: float = 0.1


def main(config: SimCLRConfig) -> None:
    refuse_outside(config, {"temperature": (1e-6,)})
    pretrain(config, "simclr", partial(nt_xent, temperature=config.temperature), joint=True, last_norm=True)


if __name__ == "__main__":
    run(SimCLRConfig, main, expected=(DataError,))
