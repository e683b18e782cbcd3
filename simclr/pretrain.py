"""Pretrain a backbone on unlabelled drawings by SimCLR (Chen et al. 2020, arXiv 2002.05709).

    python -m simclr.pretrain --data-dir DRAWINGS --exp-dir checkpoints/simclr

Writes backbone.safetensors into the exp-dir, for detection.finetune. The same command, run again, resumes
where it stopped.

Defaults: ResNet-50, batch 256, learning rate 0.3 * 256 / 256 with 10 epochs of warm-up and a cosine to 0,
projector 2048-128 with BatchNorm on each layer, temperature 0.1. A ResNet-18 with batches of 64 took 17
minutes for 1,400 steps on two x86-64 cores; finetuned on 80 circuits it had twice the AP of random weights
(docs/results.md).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cluster.config import setting
from cluster.entry import run
from pretraining.config import LAPTOP, PretrainConfig


@dataclass(frozen=True, kw_only=True)
class SimCLRConfig(PretrainConfig):
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "laptop": LAPTOP | {"projector": (512, 128), "lr_scaling": "sqrt"}
    }

    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path = Path("checkpoints/simclr")
    # Widths of the projector's layers.
    projector: tuple[int, ...] = (2048, 128)
    # Temperature tau of NT-Xent, in units of cosine similarity.
    temperature: float = setting(0.1, least=1e-6)


def base_lr(batch_size: int, epochs: float) -> float:
    """Learning rate per 256 windows (section 2.2 of the paper), the same for every batch size and length."""
    return 0.3


def main(config: SimCLRConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from pretraining.stage import Method, pretrain
    from simclr.loss import dense_nt_xent, nt_xent

    loss = partial(nt_xent, temperature=config.temperature)
    dense = partial(dense_nt_xent, temperature=config.temperature)
    pretrain(
        config, Method(name="simclr", loss=loss, joint=True, last_norm=True, base_lr=base_lr, dense=dense)
    )


if __name__ == "__main__":
    run(SimCLRConfig, main)
