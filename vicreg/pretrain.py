"""Pretrain a backbone on unlabelled drawings by VICReg (Bardes et al. 2022, arXiv 2105.04906).

    python -m vicreg.pretrain --data-dir DRAWINGS --exp-dir checkpoints/vicreg

Leaves backbone.safetensors in the exp-dir for detection.finetune. The same command again goes on where it
stopped.
ResNet-50, expander 8192-8192-8192, batch 256, base lr by batch size from the authors' README (0.5 at 256), 10
epochs of warm-up and a cosine to a thousandth. Times and figures: docs/results.md.
"""

from dataclasses import dataclass
from functools import partial

from cluster.config import run
from pretraining.config import PretrainConfig
from pretraining.stage import pretrain
from schematics.sheets import DataError
from vicreg.loss import vicreg_loss


@dataclass(frozen=True, kw_only=True)
class VICRegConfig(PretrainConfig):
    # Widths of the expander's layers.
    projector: tuple[int, ...] = (8192, 8192, 8192)
    # Where the cosine ends, as a share of the peak.
    min_lr_ratio: float = 0.001
    # Weight of the invariance term.
    sim_coeff: float = 25.0
    # Weight of the variance term.
    std_coeff: float = 25.0
    # Weight of the covariance term.
    cov_coeff: float = 1.0


def main(config: VICRegConfig) -> None:
    loss = partial(
        vicreg_loss, sim_coeff=config.sim_coeff, std_coeff=config.std_coeff, cov_coeff=config.cov_coeff
    )
    pretrain(config, "vicreg", loss, joint=False, last_norm=False)


if __name__ == "__main__":
    run(VICRegConfig, main, expected=(DataError,))
