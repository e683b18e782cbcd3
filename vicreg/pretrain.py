"""Pretrain a backbone on unlabelled drawings by VICReg (Bardes et al. 2022, arXiv 2105.04906).

    python -m vicreg.pretrain --data-dir DRAWINGS --exp-dir checkpoints/vicreg

Writes backbone.safetensors into the exp-dir, for detection.finetune. The same command, run again, resumes
where it stopped.

Defaults: ResNet-50, expander 8192-8192-8192, batch 256, base learning rate by batch size from the authors'
README (0.5 at 256), 10 epochs of warm-up and a cosine to a thousandth. They are meant for a GPU, where they
have not been timed yet; on a few CPU cores use --preset laptop (a ResNet-18, projector 512-512, batches of 64
windows at 96 px, half an hour) and --minutes.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cluster.config import setting
from cluster.entry import run
from pretraining.config import LAPTOP, PretrainConfig


@dataclass(frozen=True, kw_only=True)
class VICRegConfig(PretrainConfig):
    presets: ClassVar[dict[str, dict[str, Any]]] = {"laptop": LAPTOP | {"projector": (512, 512)}}

    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path = Path("checkpoints/vicreg")
    # Widths of the expander's layers.
    projector: tuple[int, ...] = (8192, 8192, 8192)
    # Learning rate at the end of the cosine, as a share of the peak.
    min_lr_ratio: float = 0.001
    # Weight of the invariance term.
    sim_coeff: float = setting(25.0)
    # Weight of the variance term.
    std_coeff: float = setting(25.0)
    # Weight of the covariance term.
    cov_coeff: float = setting(1.0)


def base_lr(batch_size: int, epochs: float) -> float:
    """Learning rate per 256 windows by batch size and length, from the table in the authors' README."""
    if epochs >= 1000 and batch_size >= 2048:
        return 0.2
    if batch_size >= 1024:
        return 0.3
    if batch_size >= 512:
        return 0.3 if epochs <= 100 else 0.4
    return 0.5 if batch_size >= 256 else 0.8


def main(config: VICRegConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from pretraining.stage import Method, pretrain
    from vicreg.loss import dense_vicreg, vicreg_loss

    coefficients = {name: getattr(config, name) for name in ("sim_coeff", "std_coeff", "cov_coeff")}
    loss, dense = partial(vicreg_loss, **coefficients), partial(dense_vicreg, **coefficients)
    pretrain(
        config, Method(name="vicreg", loss=loss, joint=False, last_norm=False, base_lr=base_lr, dense=dense)
    )


if __name__ == "__main__":
    run(VICRegConfig, main)
