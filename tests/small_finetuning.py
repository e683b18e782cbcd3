"""A finetuning small enough for a test, and what it leaves."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import checkpoint
from detection.config import FinetuneConfig


def config_of(data: Path, exp_dir: Path, **changes: Any) -> FinetuneConfig:
    """Four steps of two windows of 256 px, in this process."""
    config = FinetuneConfig(
        data_dir=data,
        backbone="none",
        exp_dir=exp_dir,
        arch="resnet10t",
        fpn_channels=64,
        window=256,
        overlap=64,
        batch_size=2,
        steps=4,
        lr=0.02,
        scheduler="constant",
        warmup_steps=0,
        workers=0,
        validate_every=20,
        log_every=1,
        device="cpu",
        precision="fp32",  # auto is not the same on every machine
    )
    return replace(config, **changes)


def lines_of(exp_dir: Path) -> list[dict[str, Any]]:
    """The journal."""
    return [json.loads(line) for line in (exp_dir / "metrics.jsonl").read_text().splitlines()]


def weights_of(file: Path) -> dict[str, Any]:
    """The tensors of a model.pt."""
    return checkpoint.read(file)["model"]
