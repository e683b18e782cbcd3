"""A run fits the machine, window and batch its memory and steps its time, and keeps what was fitted."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_finetuning import config_of, lines_of, weights_of

from cluster import checkpoint
from cluster.config import recorded
from cluster.distributed import World
from cluster.entry import parse
from cluster.errors import UserError
from cluster.journal import Journal
from cluster.memory import _main_memory, free_memory, tell_bytes
from cluster.training import paced
from detection.config import FinetuneConfig
from detection.finetune import main
from detection.memory import Fit, Footprint, fit_to_memory
from detection.spec import Spec
from detection.start import steps_in
from schematics.coco import read_split
from schematics.store import WindowStore
from simclr.pretrain import SimCLRConfig
from simclr.pretrain import main as pretrain
from vicreg.pretrain import VICRegConfig

pytestmark = pytest.mark.usefixtures("one_thread")
TIGHT = Footprint(fixed=0, window=0, pixel=1000.0, anchors=0.0)


@pytest.fixture
def pretraining(sheets, tmp_path):
    return SimCLRConfig(
        data_dir=sheets / "unlabeled",
        exp_dir=tmp_path / "run",
        arch="resnet10t",
        projector=(16, 16),
        batch_size=4,
        image_size=32,
        window=96,
        workers=0,
        log_every=1,
        device="cpu",
        precision="fp32",
    )


def test_the_least_limit_is_the_memory_that_there_is(tmp_path):
    """Of the kernel, of control groups of both versions and those above them, of Slurm."""
    files = {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "proc/self/cgroup": "4:cpu,memory:/a/b\n0::/c/d\n",
        "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "5\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "7000000\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "3000000\n",
        "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 7\ntotal_inactive_file 1000000\n",
        "sys/fs/cgroup/c/d/memory.max": "max\n",
        "sys/fs/cgroup/c/memory.max": "6000000\n",
        "sys/fs/cgroup/c/memory.current": "600000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    limits = list(_main_memory(tmp_path, {"SLURM_MEM_PER_NODE": "4"}))
    assert {8_192_000, 5_000_000, 5_400_000, 4 << 20} <= set(limits) and min(limits) == 4 << 20
    assert list(_main_memory(tmp_path / "none", {"SLURM_MEM_PER_NODE": "0"})) == []


def test_ranks_of_a_node_share_its_memory():
    env = {"SLURM_MEM_PER_NODE": "1000"}
    cpu = torch.device("cpu")
    assert free_memory(cpu, 4, env) == free_memory(cpu, 1, env) // 4 == 250 << 20


def fit(sheets, window=None, batch=None, ranks=1, free=10**10, side=448):
    labelled = read_split(sheets / "train").sheets
    return fit_to_memory(TIGHT, side, 64, labelled, window, batch, ranks, free)


def test_the_batch_is_halved_before_the_window_shrinks(sheets):
    """Bytes of a step here: 1.3 times 1,000 a pixel of all windows."""
    of = lambda side, batch: int(1.3 * 1000 * side**2 * batch / 0.85) + 100  # noqa: E731
    assert (fit(sheets).window, fit(sheets).batch) == (448, 8)
    got = [fit(sheets, free=of(side, batch)) for side, batch in ((448, 4), (448, 2), (384, 2))]
    assert [(f.window, f.batch) for f in got] == [(448, 4), (448, 2), (384, 2)]
    assert fit(sheets, ranks=4, free=of(448, 1)).batch == 4, "a rank has a share of the batch"
    with pytest.raises(UserError, match=r"that is the least for these sheets; --scale 0.5"):
        fit(sheets, free=10)


def test_what_is_given_is_obeyed_and_warned_of(sheets):
    got = fit(sheets, window=448, batch=16, free=10)
    assert (got.window, got.batch) == (448, 16) and str(got).startswith("warning: batches of 16")
    assert fit(sheets, batch=3, free=10**8).batch == 3
    assert "warning" not in str(fit(sheets, window=448, batch=16))


PEAK = """
import sys, torch
from dataclasses import replace
torch.set_num_threads(1)
from detection.memory import measure_footprint
from detection.model import Detector, Spec
from detection.anchors import Anchors
sizes = ((16, 24), (32, 45), (64, 90), (128, 181), (256, 362))
spec = Spec(arch=sys.argv[1], norm=sys.argv[2], head="mlp", fpn_channels=128, categories=((1, "a"),),
            color_mode="gray", mean=(0.9,) * 3, std=(0.2,) * 3, window=448, overlap=64,
            anchors=Anchors(sizes, (0.5, 1.0, 2.0)), rois=64, proposals=256, detections=100,
            score_threshold=0.01)
detector = Detector(spec).train()
footprint = measure_footprint(detector, "fp32", 2)
def memory(name):
    # Not the peak of getrusage, which starts from that of the process that started this one.
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))
before = memory("VmRSS")
optimizer = torch.optim.SGD(detector.parameters(), lr=0.001, momentum=0.9)
boxes = int(sys.argv[3])
corners = torch.rand(boxes, 2) * 400
target = {"boxes": torch.cat([corners, corners + 30], 1), "labels": torch.ones(boxes, dtype=torch.int64)}
for _ in range(2):
    images = torch.zeros(4, 3, 448, 448, dtype=torch.uint8)
    losses = detector(images, [target] * 4, list(range(4)))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
print(footprint.need(448, 4, boxes) / (memory("VmHWM") - before))
"""


@pytest.mark.parametrize(
    ("arch", "norm", "boxes"), [("resnet10t", "sync", 600), ("efficientnet_lite0", "group", 30)]
)
def test_the_estimate_is_near_the_peak_of_real_steps(arch, norm, boxes):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, arch, norm, str(boxes)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert 0.75 < float(done.stdout) < 1.25, done.stderr


def test_a_run_goes_on_with_its_batch_where_memory_is_shorter(sheets, tmp_path, monkeypatch, capfd):
    config = config_of(sheets, tmp_path / "run", batch_size=None, steps=1)
    main(config)
    assert json.loads((tmp_path / "run/config.json").read_text())["batch_size"] == 8
    capfd.readouterr()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "200")
    main(replace(config, steps=2))
    assert "warning: batches of 8 windows of 256 px" in capfd.readouterr().out
    assert json.loads((tmp_path / "run/config.json").read_text())["batch_size"] == 8
    with pytest.raises(UserError, match=r"--batch-size 4: the run in .* has 8"):
        main(replace(config, steps=3, batch_size=4))


def test_a_new_run_takes_a_smaller_batch_where_memory_is_short(sheets, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "400")
    main(config_of(sheets, tmp_path / "run", batch_size=None, dry_run=True))
    told = capfd.readouterr().out
    assert "batches of 4 windows of 256 px" in told or "batches of 2 windows of 256 px" in told
    assert "a step" in told and "in all" in told and not (tmp_path / "run").exists()


def test_little_memory_is_told_in_megabytes():
    told = [tell_bytes(number) for number in (0, 4.4e6, 99e6, 1e8, 3.16e9)]
    assert told == ["0 MB", "4 MB", "99 MB", "0.1 GB", "3.2 GB"]
    assert "about 5 MB of memory, 99 MB are free" in str(Fit(64, 2, 5 * 10**6, 99 * 10**6))


def test_dry_runs_end_before_the_exp_dir_is_there(pretraining, capfd):
    pretrain(replace(pretraining, steps=7, dry_run=True))
    told = capfd.readouterr().out
    assert re.search(r"a step takes about \d+ MB of memory; [\d.]+ [GM]B are free", told)
    assert "for 7 steps" in told and not pretraining.exp_dir.exists()


def test_minutes_become_steps_that_the_run_keeps(pretraining, capfd):
    """The steps that were timed leave no trace: that number of steps, given, ends in the same weights."""
    timed = replace(pretraining, minutes=0.02)
    pretrain(timed)
    steps = checkpoint.check_final(timed.exp_dir)["step"]
    assert steps == json.loads((timed.exp_dir / "config.json").read_text())["steps"] >= 1
    assert recorded(timed, timed.exp_dir, "cpu").steps == steps
    assert recorded(replace(timed, minutes=0.03), timed.exp_dir, "cpu").steps is None, (
        "another length is timed anew"
    )
    with pytest.raises(UserError, match=r"--minutes 0\.02 and --steps 5: give one of them"):
        pretrain(replace(timed, steps=5))
    capfd.readouterr()
    pretrain(timed)
    assert f"finished at step {steps}, nothing to do" in capfd.readouterr().out
    given = replace(pretraining, steps=steps, exp_dir=timed.exp_dir.with_name("given"))
    pretrain(given)
    one, other = (load_file(c.exp_dir / "backbone.safetensors") for c in (timed, given))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_minutes_of_finetuning_leave_no_trace_either(sheets, tmp_path):
    main(config_of(sheets, tmp_path / "timed", minutes=0.02, steps=None))
    steps = checkpoint.check_final(tmp_path / "timed")["step"]
    main(config_of(sheets, tmp_path / "given", steps=steps))
    assert lines_of(tmp_path / "timed") == lines_of(tmp_path / "given")
    one, other = (weights_of(tmp_path / name / "last.pt") for name in ("timed", "given"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_validations_take_their_share_of_the_time():
    assert steps_in(100, step=1, validation=0, between=10) == 100
    assert steps_in(100, step=1, validation=10, between=10) == 45, "5 validations of 10 s and 45 steps"
    assert steps_in(1, step=5, validation=10, between=10) == 1


def test_a_long_run_on_a_cpu_is_told_its_cure(tmp_path, capfd):
    journal = Journal(tmp_path, World(), 10**9)
    rows = ((step, np.ones(10_000).sum()) for step in range(8))
    assert [step for step, _ in paced(rows, 10**12, journal, torch.device("cpu"))] == list(range(8))
    journal.close()
    told = capfd.readouterr().out
    assert "to go" in told and "--minutes N" in told and "--preset laptop" in told


def test_flags_that_are_given_win_over_a_preset():
    need = ["--data-dir", "a", "--exp-dir", "b"]
    laptop = parse(SimCLRConfig, [*need, "--preset", "laptop"])
    assert (laptop.arch, laptop.batch_size, laptop.projector, laptop.minutes) == (
        "resnet18",
        64,
        (512, 128),
        30,
    )
    own = parse(SimCLRConfig, [*need, "--preset=laptop", "--arch", "resnet50", "--projector", "8", "9"])
    assert (own.arch, own.projector, own.image_size) == ("resnet50", (8, 9), 96)
    assert parse(SimCLRConfig, [*need, "--preset", "laptop", "--epochs", "3"]).minutes is None
    assert parse(VICRegConfig, [*need, "--preset", "laptop"]).projector == (512, 512)
    tuned = parse(FinetuneConfig, [*need, "--backbone", "none", "--preset", "laptop", "--lr", "1"])
    assert (tuned.lr, tuned.fpn_channels, tuned.batch_size) == (1, 128, 4)


def test_a_command_without_any_flag_has_all_defaults(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "unlabeled").mkdir(parents=True)
    assert parse(SimCLRConfig, []) == SimCLRConfig()
    with pytest.raises(SystemExit):
        parse(SimCLRConfig, ["--preset"])
    assert "--preset" in capsys.readouterr().err


def test_runs_on_one_pool_share_its_store(pretraining, sheets):
    two = [replace(pretraining, steps=1, exp_dir=pretraining.exp_dir.with_name(name)) for name in "ab"]
    for config in (*two, replace(two[0], exp_dir=two[0].exp_dir.with_name("c"), window=64)):
        pretrain(config)
    stores = sorted(pretraining.exp_dir.parent.glob("windows-*"))
    assert [WindowStore(store).side for store in stores] in ([96, 64], [64, 96])
    assert not list(pretraining.exp_dir.parent.glob("*/windows"))


def test_scaled_sheets_are_learned_and_found_in_their_own_pixels(sheets, tmp_path):
    main(config_of(sheets, tmp_path / "run", scale=0.5, window=128, overlap=32, steps=1))
    state = checkpoint.read(tmp_path / "run/model.pt")
    assert state["spec"]["scale"] == 0.5
    older = {name: value for name, value in state["spec"].items() if name != "scale"}
    assert Spec.from_dict(older).scale == 1.0
    with pytest.raises(UserError, match=r"--scale 0.25: the run in .* has 0.5"):
        main(config_of(sheets, tmp_path / "run", scale=0.25, window=128, overlap=32, steps=1))
