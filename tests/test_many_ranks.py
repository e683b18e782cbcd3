"""From three ranks on, where the order of a sum matters, a resumed run equals an uninterrupted one too."""

import contextlib
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import Ranks
from safetensors.torch import load_file
from small_finetuning import config_of, weights_of

from detection import finetune
from pretraining.config import PretrainConfig
from pretraining.stage import Method, pretrain
from simclr.loss import nt_xent
from vicreg.loss import vicreg_loss

STEPS = 3
LOSSES = {"simclr": nt_xent, "vicreg": vicreg_loss, "micro": nt_xent}


def trainers(size: int) -> list[str]:
    """By name; the one in micro-batches runs on three ranks alone, to save time."""
    return [name for name in (*LOSSES, "finetune") if name != "micro" or size == 3]


def train(name: str, sheets: Path, exp_dir: Path, steps: int, size: int) -> None:
    """A run at a constant rate, so that its length does not change its steps."""
    if name == "finetune":
        finetune.main(
            config_of(sheets, exp_dir, arch="test_resnet", window=128, batch_size=size, steps=steps)
        )
        return
    config = PretrainConfig(
        data_dir=sheets / "unlabeled",
        exp_dir=exp_dir,
        arch="test_resnet",
        projector=(512, 512),
        batch_size=4 * size if name == "micro" else 2 * size,
        micro_batch=2 if name == "micro" else None,
        steps=steps,
        image_size=32,
        window=96,
        workers=0,
        warmup_epochs=0.0,
        min_lr_ratio=1.0,
        device="cpu",
        precision="fp32",
    )
    joint = name != "vicreg"
    facts = {"joint": joint, "last_norm": joint, "base_lr": lambda *_: 1.0}
    pretrain(config, Method(name=name, loss=LOSSES[name], **facts))


def live_thrice(sheets: Path, folder: Path, ports: list[int]) -> None:
    """Each trainer, uninterrupted and in two lives; each life has a process group of its own."""
    free = iter(ports)
    for name in trainers(int(os.environ["WORLD_SIZE"])):
        for run, steps in (("whole", STEPS), ("parts", 1), ("parts", STEPS)):
            os.environ["MASTER_PORT"] = str(next(free))
            train(name, sheets, folder / run / name, steps, int(os.environ["WORLD_SIZE"]))


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


@pytest.mark.parametrize("size", [3, 4])
def test_a_resumed_run_of_several_ranks_equals_an_uninterrupted_one(size, sheets, tmp_path):
    work = partial(live_thrice, sheets, tmp_path, free_ports(3 * (len(LOSSES) + 1)))
    with Ranks(work, size=size, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses(180) == [0] * size, ranks.log() + ranks.log(1)
    for name in trainers(size):
        read, file = (weights_of, "last.pt") if name == "finetune" else (load_file, "backbone.safetensors")
        whole, parts = (read(tmp_path / run / name / file) for run in ("whole", "parts"))
        assert all(torch.equal(whole[key], parts[key]) for key in whole), name
