"""--compile: the same network in other code. A resumed run equals a whole one, and its state fits any run."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch._inductor.config
from torch import nn

from cluster import config as configuration
from cluster.backbone import Normalise
from cluster.distributed import World
from cluster.errors import FAILED, UserError
from cluster.guard import Guard
from cluster.training import GuardedStep, parallel
from detection.config import FinetuneConfig
from pretraining.encoder import Encoder
from pretraining.gradcache import GradCache
from simclr.loss import nt_xent
from simclr.pretrain import SimCLRConfig

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Run:
    """A small network with BatchNorm that learns from micro-batches in bf16."""

    def __init__(self, compiled: str | None):
        torch.compiler.reset()  # as in a process of its own
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.encoder = Encoder(Normalise((0.9,) * 3, (0.2,) * 3), body, nn.Linear(8 * 7 * 7, 8), True)
        self.optimizer = torch.optim.SGD(self.encoder.parameters(), 0.1, momentum=0.9)
        model = parallel(self.encoder, World(), compiled)
        self.step = GuardedStep(model, self.optimizer, lambda _: 1e-3, Guard(), CPU, 1.0, "bf16")
        self.cache = GradCache(model, 2, self.step.autocast)

    def losses(self, first: int, last: int) -> list[float]:
        found = []
        for number in range(first, last):
            draw = torch.Generator().manual_seed(number)
            views = torch.randint(0, 256, (2, 4, 1, 16, 16), generator=draw, dtype=torch.uint8)
            with self.step.forward():
                z1, z2 = self.cache.embed(*views)
            loss = nt_xent(z1.float(), z2.float())[0]
            self.step.take(number, loss, self.cache.carry)
            found.append(loss.item())
        return found

    def state(self) -> list[dict]:
        return copy.deepcopy([self.encoder.state_dict(), self.optimizer.state_dict()])

    def restore(self, state: list[dict]) -> None:
        self.encoder.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


def test_a_compiled_run_resumes_to_the_last_bit_and_its_weights_fit_a_plain_network(monkeypatch):
    # torch would first build a program for each vector unit, to see that the compiler knows it.
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", True)
    whole = Run("")
    losses = whole.losses(0, 2)
    between = whole.state()
    losses += whole.losses(2, 4)
    resumed, plain = Run(""), Run(None)
    for run in (resumed, plain):
        assert list(run.state()[0]) == list(between[0])
    assert plain.losses(0, 2) == pytest.approx(losses[:2], rel=2e-2), "bf16 rounds in other places"
    for run in (resumed, plain):
        run.restore(between)
    assert resumed.losses(2, 4) == losses[2:]
    assert plain.losses(2, 4) == pytest.approx(losses[2:], rel=2e-2)


@pytest.mark.parametrize("config_class", [SimCLRConfig, FinetuneConfig])
def test_a_run_stays_compiled_or_not(config_class, tmp_path):
    config = config_class(exp_dir=tmp_path)
    configuration.save(config, tmp_path / "config.json")
    with pytest.raises(UserError, match=f"--compile True: the run in {tmp_path} has False"):
        configuration.refuse_changes(replace(config, compile=True), tmp_path)


@pytest.mark.parametrize("module", ["simclr.pretrain", "detection.finetune"])
def test_without_a_compiler_it_is_one_line(module, sheets, tmp_path):
    data = sheets / "unlabeled" if module == "simclr.pretrain" else sheets
    flags = ["--data-dir", str(data), "--exp-dir", str(tmp_path / "run"), "--device", "cpu", "--compile"]
    if module == "detection.finetune":
        flags += ["--backbone", "none"]
    # Of a folder of its own, since what was compiled before needs no compiler.
    env = os.environ | {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-m", module, *flags], capture_output=True, text=True, env=env)
    (line,) = [line for line in done.stderr.splitlines() if "CUDA_HOME" not in line]
    assert done.returncode == FAILED and line.startswith("error: --compile: torch can't compile"), line
    assert "g++" in line and not (tmp_path / "run").exists()
