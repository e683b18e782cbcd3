"""Show what backbone a file holds, and convert it to a backbone.safetensors, which every stage takes.

    python -m cluster.weights FILE                              # shows it
    python -m cluster.weights FILE OUT.safetensors              # converts it too
    python -m cluster.weights FILE OUT.safetensors --arch resnet18

FILE is a checkpoint of torchvision, timm, VICReg, solo-learn, lightly, MoCo, stable-pretraining or a SimCLR
repository (docs/weights.md). Code in it is never run. Seconds on any machine.
"""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from cluster.config import Config, setting
from cluster.entry import run
from cluster.errors import UserError
from cluster.facts import LEAST_STD


@dataclass(frozen=True, kw_only=True)
class WeightsConfig(Config):
    # The file to read, and the .safetensors to write, if any.
    files: Positional[tuple[Path, ...]] = ()
    # Architecture by its name in timm; by default the one that the file tells, else resnet50.
    arch: str | None = None
    # Mean of the images that the weights were trained on, in units of 0..1, where the file doesn't tell it.
    mean: tuple[float, float, float] | None = setting(None, least=0, most=1)
    # Their standard deviation, in units of 0..1.
    std: tuple[float, float, float] | None = setting(None, least=LEAST_STD, most=1)


def main(config: WeightsConfig) -> None:
    # Imported here, so that --help and wrong flags are answered before torch is loaded.
    from cluster.backbone import write_backbone
    from cluster.foreign import convert

    if len(config.files) not in (1, 2):
        raise UserError("name FILE to show it, or FILE and OUT.safetensors to convert it")
    if (config.mean is None) != (config.std is None):
        raise UserError(f"--{'mean' if config.std is None else 'std'}: give --mean and --std, or neither")
    for out in config.files[1:]:
        if out.suffix != ".safetensors" or out.exists():
            raise UserError(f"{out}: name a .safetensors file that does not exist yet")
    tensors, meta, story = convert(str(config.files[0]), config.arch)
    if config.mean is not None:
        meta |= {"mean": config.mean, "std": config.std}
        story += "\nmean and std are those of the flags"
    print(story)
    for out in config.files[1:]:
        write_backbone(out, tensors, meta)
        print(f"{out}: {len(tensors)} tensors of {meta['arch']}")


if __name__ == "__main__":
    run(WeightsConfig, main)
