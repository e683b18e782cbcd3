"""Pretraining: a resumed run equals an uninterrupted one, workers change nothing, bad input is one line."""

import dataclasses
import json
import os
import re
import signal
import time
from itertools import chain

import cv2
import numpy as np
import pytest
import torch
from processes import Ranks
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster import checkpoint, distributed
from cluster.batches import Batches
from cluster.distributed import World
from cluster.errors import UserError
from cluster.lifecycle import SAVING
from detection.validation import VALIDATING
from pretraining import stage
from pretraining.config import PretrainConfig
from pretraining.data import Pairs, collate, epoch_order
from pretraining.features import open_backbone
from pretraining.stage import Method, pretrain
from schematics import draws
from schematics.sheets import DataError
from schematics.store import build_store
from simclr import pretrain as simclr
from simclr.loss import nt_xent
from vicreg import pretrain as vicreg
from vicreg.loss import vicreg_loss

STEPS = 6
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    rng = np.random.default_rng(0)
    for number in range(4):
        sheet = np.full((160, 200), 255, np.uint8)
        for x, y, length in rng.integers([0, 0, 20], [180, 150, 60], (12, 3)).tolist():
            cv2.line(sheet, (x, y), (x + length, y), 0, 2)
            cv2.line(sheet, (x, y), (x, y + length), 0, 2)
        cv2.imwrite(str(folder / f"{number}.png"), sheet)
    return folder


@pytest.fixture
def config(pool, tmp_path):
    return PretrainConfig(
        data_dir=pool,
        exp_dir=tmp_path / "run",
        arch="resnet18",
        projector=(16, 16),
        batch_size=4,
        steps=STEPS,
        image_size=32,
        window=96,
        workers=0,
        log_every=1,
        device="cpu",
        precision="fp32",
    )


def run(config, method="vicreg", loss=None):
    loss = loss or {"simclr": nt_xent, "vicreg": vicreg_loss}[method]
    base_lr = {"simclr": simclr, "vicreg": vicreg}[method].base_lr
    joint = last_norm = method == "simclr"
    pretrain(config, Method(name=method, loss=loss, joint=joint, last_norm=last_norm, base_lr=base_lr))
    return journal(config), load_file(config.exp_dir / "backbone.safetensors")


def journal(config):
    return [json.loads(line) for line in (config.exp_dir / "metrics.jsonl").read_text().splitlines()]


def at(step, action, loss=vicreg_loss, last=None):
    """`loss`, with `action` applied to its value in its calls number `step` to `last`, counted from 0."""
    calls = iter(range(1000))

    def changed(z1, z2):
        value, terms = loss(z1, z2)
        return (action(value) if step <= next(calls) <= (last or step) else value), terms

    return changed


def interrupt(number):
    def action(value):
        os.kill(os.getpid(), number)
        return value

    return action


@pytest.mark.parametrize("method", ["simclr", "vicreg"])
def test_a_run_stopped_by_a_signal_and_resumed_equals_an_uninterrupted_one(config, method, capfd):
    whole, weights = run(config, method)
    assert [line["step"] for line in whole] == list(range(STEPS))
    assert {"loss", "embedding_std", "rank_me", "lr", "grad_norm"} < set(whole[0])

    parts = dataclasses.replace(config, exp_dir=config.exp_dir.with_name("parts"))
    loss = {"simclr": nt_xent, "vicreg": vicreg_loss}[method]
    with pytest.raises(SystemExit) as stopped:
        run(parts, method, at(2, interrupt(signal.SIGUSR2), loss))
    assert stopped.value.code == 75
    # The flag is raised by another thread: the agreed stop is at this boundary or the next.
    assert 3 <= len(journal(parts)) <= 4
    resumed, resumed_weights = run(parts, method)
    assert [{k: float(v).hex() for k, v in line.items()} for line in resumed] == [
        {k: float(v).hex() for k, v in line.items()} for line in whole
    ]
    assert weights.keys() == resumed_weights.keys()
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)

    assert "has changed" not in capfd.readouterr().out
    run(parts, method)
    assert f"finished at step {STEPS}, nothing to do" in capfd.readouterr().out


def test_what_a_view_shows_is_said_and_a_run_of_before_the_flag_goes_on(config, capfd):
    config = dataclasses.replace(config, steps=2)
    run(config)
    assert (
        "views by the recipe drawing: each shows 31 to 56 px of the sheet, drawn at 32 px"
        in capfd.readouterr().out
    )
    old = json.loads((config.exp_dir / "config.json").read_text())
    del old["view"], old["without"]
    (config.exp_dir / "config.json").write_text(json.dumps(old))
    run(dataclasses.replace(config, steps=3))
    with pytest.raises(UserError, match=r"--view 80: the run in .* has None"):
        run(dataclasses.replace(config, steps=4, view=80))


def test_a_change_of_the_recipe_is_left_out_of_a_whole_run_and_a_wrong_name_is_refused_at_once(config, capfd):
    config = dataclasses.replace(config, steps=2, without=("blur", "crop"))
    less, _ = run(config)
    assert "recipe drawing without blur, crop: each shows 56 px of the sheet" in capfd.readouterr().out
    whole, _ = run(dataclasses.replace(config, without=(), exp_dir=config.exp_dir.with_name("whole")))
    assert less[0]["loss"] != whole[0]["loss"]
    with pytest.raises(UserError, match=r"--without \[\]: the run in .* has \['blur', 'crop'\]"):
        run(dataclasses.replace(config, steps=3, without=()))
    with pytest.raises(
        UserError, match="--without gray: the recipe drawing has crop, turn, pen, blur, jitter, "
    ):
        dataclasses.replace(config, without=("blur", "gray"))


@pytest.mark.parametrize("color_mode", ["gray", "auto", "rgb"])
def test_a_gray_pool_has_views_in_one_channel_and_a_pool_with_color_in_three(pool, tmp_path, color_mode):
    store = build_store(pool, tmp_path / "store", 64, color_mode=color_mode)
    pairs = Pairs(store, "drawing", 32, 56, 0, 1.0, False)
    items = [pairs[1, 0, i] for i in range(5)]
    for views, one_by_one in zip(collate(items), zip(*items, strict=True), strict=True):
        assert views.shape == (5, 3 if color_mode == "rgb" else 1, 32, 32) and views.dtype == torch.uint8
        assert views.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(views, torch.stack(one_by_one))
        assert (views == views[:, :1]).all()  # the pool is gray
    assert stage.views(pairs, 2).shape == (64, 64, 3)


def test_workers_change_nothing(config):
    alone, _ = run(dataclasses.replace(config, steps=3))
    two, _ = run(dataclasses.replace(config, steps=3, workers=2, exp_dir=config.exp_dir.with_name("two")))
    assert alone == two


def test_deterministic_changes_nothing_on_a_cpu(config, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    plain = run(dataclasses.replace(config, steps=3))
    repeatable = dataclasses.replace(config, steps=3, deterministic=True)
    lines, weights = run(dataclasses.replace(repeatable, exp_dir=config.exp_dir.with_name("repeatable")))
    assert torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" in os.environ
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    distributed.choose_algorithms(deterministic=False)
    assert lines == plain[0] and all(torch.equal(weights[name], plain[1][name]) for name in weights)


def slow_drawing(config):
    def slow(*arguments):
        stage.embed = embed
        time.sleep(8)
        return embed(*arguments)

    embed, stage.embed = stage.embed, slow
    run(config)


def test_the_other_ranks_wait_while_rank_0_draws_the_embedding(config, tmp_path):
    """For longer than a step may take."""
    config = dataclasses.replace(config, arch="test_resnet", steps=2, batch_size=46)
    config = dataclasses.replace(config, embed_every=1, step_timeout=3.0)
    with Ranks(slow_drawing, config, size=2, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses() == [0, 0], ranks.log() + ranks.log(1)


def test_the_group_fails_after_any_step_that_may_hang(config):
    for seconds in (600.0, 7200.0):
        patient = dataclasses.replace(config, step_timeout=seconds)
        assert patient.joining["collective_timeout"] > seconds + SAVING + stage.DRAWING + VALIDATING


def test_the_backbone_carries_what_the_next_stage_needs_and_the_embedding_is_drawn(config, pool):
    _, tensors = run(config)
    assert len(tensors) == 120
    backbone, meta = open_backbone(config.exp_dir / "backbone.safetensors")
    assert meta["arch"] == "resnet18" and meta["method"] == "vicreg" and meta["color_mode"] == "gray"
    assert meta["step"] == STEPS and meta["image_size"] == 32
    sheets = np.stack([cv2.imread(str(file), 0) for file in sorted(pool.iterdir())]) / 255
    assert np.allclose(meta["mean"], sheets.mean(), atol=0.05) and np.allclose(
        meta["std"], sheets.std(), atol=0.05
    )
    board = config.exp_dir / "tensorboard"
    assert list(board.rglob("tensors.tsv")) and list(board.rglob("sprite.png"))
    events = EventAccumulator(str(board))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(STEPS))
    assert events.Tags()["images"] == ["views"]
    (names,) = {file.read_text() for file in board.rglob("metadata.tsv")}
    assert all(
        name.partition(" @")[0] in {file.name for file in pool.iterdir()} for name in names.splitlines()
    )
    assert isinstance(backbone, torch.nn.Module) and not backbone.training
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    assert backbone(pixels).shape == (2, 512)


def test_a_step_that_is_not_finite_is_skipped_without_a_trace(config):
    """After it the losses and the saved network are finite, and the guard counts no skipped step any more."""
    skipping, _ = run(config, loss=at(2, lambda value: value * torch.nan))
    assert np.isnan(float(skipping[2]["grad_norm"]))
    assert all(np.isfinite(float(line["loss"])) for line in skipping[3:])
    state = torch.load(config.exp_dir / "checkpoints" / f"step_{STEPS:08d}.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["encoder"].values())
    # Five steps were taken: BatchNorm counts batches in an integer, which is not restored.
    assert state["guard"] == {"skipped": 0, "rollbacks": 0, "offset": 0}


def test_three_in_a_row_go_back_and_pass_that_data_over(config, capfd):
    config = dataclasses.replace(config, checkpoint_every=0)
    lines, _ = run(config, loss=at(2, lambda value: value * torch.nan, last=4))
    out = capfd.readouterr().out
    assert re.search(
        r"step 4: the gradient was not finite 3 times in a row, "
        r"last on .*png @.*; going back to step [012]\n",
        out,
    )
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(np.isfinite(float(line["loss"])) for line in lines)


def test_a_loss_that_stays_not_finite_ends_the_run_naming_step_files_and_checkpoint(config):
    with pytest.raises(
        UserError, match=r"step \d+: .*\.png @\d+,\d+.*last good checkpoint.*step_0000000\d\.pt"
    ):
        run(config, loss=at(1, lambda value: value * torch.nan, last=999))
    assert not (config.exp_dir / "final.json").exists()


def test_weights_that_overflow_end_the_run_in_the_same_way(config):
    """The embedding is not finite then, and its figures are logged all the same."""
    with pytest.raises(UserError, match="the gradient was not finite 3 times in a row"):
        run(dataclasses.replace(config, base_lr=1e38, warmup_epochs=0.0, optimizer="sgd"))


def test_a_step_without_memory_is_one_line_that_names_the_batch(config):
    with pytest.raises(UserError, match=r"^cpu: not enough memory .*: lower --batch-size or, in"):
        run(config, loss=at(1, lambda value: value * torch.ones(1 << 50)))


@pytest.mark.parametrize("flag", ["steps", "epochs"])
def test_a_run_made_shorter_than_its_checkpoint_is_refused_and_signs_nothing(config, flag):
    config = dataclasses.replace(config, checkpoint_every=0.0, batch_size=16)
    with pytest.raises(SystemExit):
        run(config, loss=at(3, interrupt(signal.SIGUSR2)))
    shorter = dataclasses.replace(config, **{"steps": None, "epochs": 1, flag: 1})
    with pytest.raises(UserError, match=rf"^--{flag} 1: the newest checkpoint in .* has done [45] of now"):
        run(shorter)
    assert not list(config.exp_dir.glob("final.json")) + list(config.exp_dir.glob("*.safetensors"))


def test_a_run_made_longer_says_what_becomes_of_its_rate(config, capfd):
    run(dataclasses.replace(config, steps=3), "simclr")
    capfd.readouterr()
    run(config, "simclr")
    told = capfd.readouterr().out
    (rate,) = re.findall(
        r"length of this run has changed: from step 3 on, the learning rate is (\S+) where", told
    )
    assert float(rate) == pytest.approx(journal(config)[3]["lr"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4096}, "--batch-size 4096: the pool has"),
        ({"batch_size": 1}, "--batch-size 1: BatchNorm needs 2 windows on each rank; give 2"),
        ({"arch": "resnet5O"}, "--arch resnet5O: .*near: .*resnet50"),
        ({"steps": 0}, "--steps 0: give 1 or more"),
        ({"workers": -1}, "--workers -1: give 0 or more"),
        ({"view": 97}, "--view 97: a window has 96 px; give at most that, or a larger --window"),
        ({"view": 50, "recipe": "simclr"}, "--view 50: the recipe simclr crops the whole window"),
        ({"image_size": 0}, "--image-size 0: give 1 or more"),
        ({"projector": (0, 8)}, "--projector 0: give 1 or more"),
        ({"base_lr": -0.1}, "--base-lr -0.1: give 0 or more"),
        ({"keep": 0}, "--keep 0: give 1 or more"),
    ],
)
def test_flags_that_cannot_work_are_one_line(config, change, words):
    with pytest.raises(UserError, match=words):
        run(dataclasses.replace(config, **change))
    assert not (config.exp_dir / "backbone.safetensors").exists()


def test_a_rate_of_zero_is_no_request_for_the_published_one(config):
    config = dataclasses.replace(config, steps=20, warmup_epochs=0.0)
    published = [line["lr"] for line in run(config, "simclr")[0]]
    none = dataclasses.replace(config, base_lr=0.0, exp_dir=config.exp_dir.with_name("none"))
    assert {line["lr"] for line in run(none, "simclr")[0]} == {0.0}
    assert published[0] == pytest.approx(0.3 * 4 / 256) and min(published) > 0


def test_a_pool_without_drawings_is_one_line(config, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match=str(empty)):
        run(dataclasses.replace(config, data_dir=empty))
    (empty / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    with pytest.raises(DataError, match=r"none of 1 sheets can be read.*torn\.png"):
        run(dataclasses.replace(config, data_dir=empty))


def test_another_architecture_on_the_same_exp_dir_is_refused_and_changes_nothing(config):
    run(dataclasses.replace(config, steps=1))
    before = {file: file.stat().st_mtime_ns for file in (config.exp_dir / "checkpoints").iterdir()}
    with pytest.raises(UserError, match=r"--arch resnet34: the run in .* has resnet18"):
        run(dataclasses.replace(config, arch="resnet34"))
    assert before == {file: file.stat().st_mtime_ns for file in (config.exp_dir / "checkpoints").iterdir()}


def keys_of(first, last, rank=0, size=1):
    """The keys of one rank's share of batches of 8 from a pool of 50 windows."""
    order, world = epoch_order(seed=3, samples=50), World(rank=rank, size=size)
    return list(Batches(None, order, per_epoch=6, batch_size=8, world=world).keys(first, last))


def test_the_global_batch_is_the_same_for_every_number_of_ranks():
    def batches(world):
        shares = [keys_of(4, 9, rank, world) for rank in range(world)]
        return [list(chain(*parts)) for parts in zip(*shares, strict=True)]

    assert batches(1) == batches(2) == batches(4)
    # Six batches an epoch, each sample at most once in it; position 6 begins epoch 1.
    assert [batch[0][0] for batch in batches(1)] == [0, 0, 1, 1, 1]
    epoch = [key for batch in keys_of(0, 6) for key in batch]
    assert len({sample for _, _, sample in epoch}) == len(set(epoch)) == 48
    assert list(chain(*keys_of(4, 6))) == epoch[32:]


def test_a_run_of_a_version_with_other_draws_goes_on_and_says_so(config, capfd):
    run(dataclasses.replace(config, steps=2))
    newest = config.exp_dir / "checkpoints" / "step_00000002.pt"
    state = checkpoint.read(newest)
    assert state.pop("draws") == draws.VIEWS_VERSION
    checkpoint.write_file(newest, state)
    capfd.readouterr()
    run(dataclasses.replace(config, steps=3))
    assert capfd.readouterr().out.count(draws.CHANGED) == 1
    run(config)
    assert draws.CHANGED not in capfd.readouterr().out
