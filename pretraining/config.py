"""What pretraining can be told, whatever the method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    # Pool of unlabelled drawings: a folder (or tree) of images and PDFs, a COCO split, or a packed store.
    data_dir: Path
    # Folder of this run; the same command again goes on from its newest valid checkpoint.
    exp_dir: Path

    # Any timm backbone; a ResNet's keys are torchvision's.
    arch: str = "resnet50"
    # Widths of the projector's layers.
    projector: tuple[int, ...]

    # Passes over the pool's windows.
    epochs: int = 100
    # Optimizer steps in place of --epochs.
    steps: int | None = None
    # Global batch in windows, divided among the ranks.
    batch_size: int = 256

    # Learning rate per 256 samples; default: the method's published one.
    base_lr: float | None = None
    # How the batch scales the learning rate: linear (base * B / 256) or sqrt (base * sqrt(B) / 4).
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    # Linear warm-up in epochs; at most a tenth of the run.
    warmup_epochs: float = 10.0
    # Where the cosine ends, as a share of the peak.
    min_lr_ratio: float = 0.0
    # lars, sgd or adamw.
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"
    # Of lars and sgd.
    momentum: float = 0.9
    # Not applied to biases and norm layers.
    weight_decay: float = 1e-6
    # Largest norm of the gradient; default: not clipped.
    clip_grad: float | None = None

    # How a window becomes two views: drawing (line art), or simclr and vicreg (the published photo recipes).
    recipe: Literal["drawing", "simclr", "vicreg"] = "drawing"
    # Side of a view in pixels.
    image_size: int = 224
    # Side of a window in pixels of the sheet.
    window: int = 512
    # Step between windows in pixels; default: half a window.
    stride: int | None = None
    # Multiplies the ranges of the colour jitter.
    strength: float = 1.0
    # Mirror and turn views in the drawing recipe too: it erases classes told apart by their orientation.
    orientation: bool = False
    # gray, rgb, or auto: gray if every drawing of the pool is.
    color_mode: Literal["auto", "gray", "rgb"] = "auto"
    # Resolution at which PDF pages are drawn.
    dpi: int = 200

    # Processes that make views, per rank.
    workers: int = 2
    # Of the weights at the start, the order of windows and the views.
    seed: int = 0
    # auto, cpu or cuda.
    device: str = "auto"
    # auto (bf16 on a GPU), fp32 or bf16. The loss is computed in float32 whatever this says.
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    # Seconds between checkpoints.
    checkpoint_every: float = 600.0
    # Epochs between checkpoints besides; 0: none.
    checkpoint_epochs: int = 10
    # Checkpoints kept.
    keep: int = 3
    # Seconds a step may take before the run is ended as hung.
    step_timeout: float = 600.0
    # Steps between lines of metrics.jsonl.
    log_every: int = 10
    # Epochs between pictures of the embedding in TensorBoard; the last step always draws one.
    embed_every: int = 10
