"""--dense-weight: matched places show the same pixels, the losses are the papers', and off is what it was."""

import dataclasses
import json
import math
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import Ranks
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from cluster import checkpoint, distributed
from cluster.backbone import Normalise, build_backbone, read_backbone
from cluster.errors import UserError
from pretraining.dense import DenseHead, carried, choose_map, grid, read, shown, with_dense
from pretraining.encoder import Encoder, build_projector, keep_statistics
from pretraining.gradcache import GradCache
from pretraining.stage import Method, pretrain
from schematics.places import across
from schematics.recipes import PARTS, RECIPES, placed_views
from simclr import pretrain as simclr
from simclr.loss import dense_nt_xent, nt_xent
from simclr.pretrain import SimCLRConfig
from vicreg import pretrain as vicreg
from vicreg.loss import dense_vicreg, vicreg_loss
from vicreg.pretrain import VICRegConfig

pytestmark = pytest.mark.usefixtures("one_thread")

# --- geometry --------------------------------------------------------------------------------------------

SIDE, VIEW = 120, 48
LEVELS = 2 * np.arange(SIDE, dtype=np.uint8)
RAMPS = np.dstack([*np.meshgrid(LEVELS, LEVELS), np.zeros((SIDE, SIDE), np.uint8)])  # a color for each pixel


def pairs(recipe: str, count: int = 40):
    """Pairs of views of the ramps with their places: moved, turned and mirrored, but of unchanged colors."""
    kept = ("crop", "turn", "mirror")
    without = [part for part in PARTS[recipe] if part not in kept]
    for sample in range(count):
        yield placed_views(
            RAMPS, recipe, VIEW, 0, 0, sample, orientation=True, extent=100, paper=(9, 9, 9), without=without
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_view_shows_at_each_place_the_pixel_of_the_window_that_it_says(recipe):
    inner = grid(9, torch.zeros(())).numpy() * 0.8  # a bicubic resize bends a ramp at its ends
    turns, mirrors = set(), set()
    for view, place in (placed for pair in pairs(recipe) for placed in pair):
        shows = read(torch.from_numpy(view).permute(2, 0, 1)[None], torch.from_numpy(inner)[None])[0, :, :2]
        points = np.column_stack([inner, np.ones(len(inner))]) @ np.array(place.rows).T
        assert (points > 0).all() and (points < SIDE).all()
        apart = shows.numpy() / 2 + 0.5 - points
        assert np.abs(apart).max() < 0.8 and np.abs(apart.mean(axis=0)).max() < 0.4  # px, by rounding
        turns.add((place.quarters, place.turn is not None))
        mirrors.add(place.mirrored)
    assert mirrors == {False, True}
    assert len(turns) == (8 if recipe == "drawing" else 1), "quarter turns, turned by degrees and not"


@pytest.mark.parametrize("recipe", RECIPES)
def test_matched_places_of_two_views_show_the_same_pixels(recipe):
    found = 0
    for (first, place1), (second, place2) in pairs(recipe):
        matrix = torch.from_numpy(across(place1, place2))[None]
        points = grid(7, matrix)
        there = carried(points, matrix)
        views = (torch.from_numpy(view).permute(2, 0, 1)[None] for view in (first, second))
        one, other = (read(view, at)[0] for view, at in zip(views, (points[None], there), strict=True))
        inner = (points.abs().amax(1) < 0.8) & (there[0].abs().amax(1) < 0.8)
        torch.testing.assert_close(one[inner] / 2, other[inner] / 2, atol=1.2, rtol=0)  # px
        assert torch.equal(shown(matrix, 7)[0], (there[0].abs() <= 1).all(1))
        found += int(inner.sum())
    assert found > 300


def test_a_map_is_read_as_torch_samples_it():
    generator = torch.Generator().manual_seed(0)
    maps, points = torch.randn(3, 5, 6, 6, generator=generator), torch.rand(3, 11, 2, generator=generator)
    points = points * 2.6 - 1.3
    theirs = F.grid_sample(maps, points[:, None], padding_mode="border", align_corners=False)
    torch.testing.assert_close(read(maps, points), theirs[:, :, 0].mT)
    torch.testing.assert_close(read(maps, grid(6, maps)[None]), maps.flatten(2).mT)


@pytest.mark.parametrize(
    ("arch", "size", "stride", "expected"),
    [
        ("resnet18", 64, 16, (3, 256, 4)),
        ("resnet18", 96, 32, (4, 512, 3)),
        ("resnet18", 96, 10, (2, 128, 12)),
        ("resnet18.cifar", 32, 16, (4, 512, 4)),
        ("test_convnext", 64, 16, (2, 48, 4)),
    ],
)
def test_the_deepest_map_that_is_fine_enough_is_read(arch, size, stride, expected):
    backbone = build_backbone(arch)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert choose_map(backbone, arch, size, stride) == expected
    assert backbone.training and all(map(torch.equal, before.values(), backbone.state_dict().values()))


# --- losses ----------------------------------------------------------------------------------------------


def local(n, k, d, seed=0):
    """Local vectors a, b [n, k, d]; window 1 has no place that is seen, the others some."""
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, k, d, generator=generator)
    seen = torch.rand(n, k, generator=generator) < 0.6
    seen[1], seen[0, 0] = False, True
    return a, b, seen


def densecl(a, b, seen, temperature):
    """Equation (2) of arXiv 2011.09157, place by place in plain floats."""

    def unit(v):
        return [x / math.hypot(*v) for x in v]

    def dot(v, w):
        return math.exp(sum(x * y for x, y in zip(v, w, strict=True)) / temperature)

    def window(vectors, m):
        rows = [unit(vectors[m, k].tolist()) for k in range(a.shape[1]) if seen[m, k]]
        return unit([sum(column) for column in zip(*rows, strict=True)])

    losses = []
    for here, there in ((a, b), (b, a)):
        windows = {m: window(there, m) for m in range(len(a)) if seen[m].any()}
        for n, k in seen.nonzero().tolist():
            anchor = unit(here[n, k].tolist())
            positive = dot(anchor, unit(there[n, k].tolist()))
            negatives = sum(dot(anchor, other) for m, other in windows.items() if m != n)
            losses.append(-math.log(positive / (positive + negatives)))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_simclrs_equals_a_transcription_of_densecl(temperature):
    a, b, seen = local(5, 7, 6)
    expected = densecl(a.double(), b.double(), seen, temperature)
    assert dense_nt_xent(a, b, seen, temperature).item() == pytest.approx(expected, rel=1e-5)
    a[1] += 5  # what only one view shows counts for nothing
    assert dense_nt_xent(a, b, seen, temperature).item() == pytest.approx(expected, rel=1e-5)
    ones = torch.ones(8, 4, 3)
    assert dense_nt_xent(ones, ones, ones[..., 0] > 0).item() == pytest.approx(math.log(8), rel=1e-6)


def test_vicregs_equals_a_transcription_over_the_places_that_are_seen():
    a, b, seen = local(5, 7, 6)
    rows = [torch.stack([part[n, k] for n, k in seen.nonzero().tolist()]).double() for part in (a, b)]
    invariance = (rows[0] - rows[1]).square().mean()
    covariances = [torch.cov(part.T) for part in rows]
    variance = sum(F.relu(1 - (c.diagonal() + 1e-4).sqrt()).mean() / 2 for c in covariances)
    off = sum((c.square().sum() - c.diagonal().square().sum()) / 6 for c in covariances)
    expected = 3 * invariance + 5 * variance + 7 * off
    assert dense_vicreg(a, b, seen, 3.0, 5.0, 7.0).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [dense_nt_xent, dense_vicreg])
def test_a_batch_whose_views_share_no_place_has_no_loss_and_a_gradient_of_zero(loss):
    a, b, seen = local(3, 4, 5)
    value = loss(a.requires_grad_(), b.requires_grad_(), torch.zeros_like(seen))
    value.backward()
    assert value.item() == 0 and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("loss", [dense_nt_xent, dense_vicreg])
def test_computed_in_float32_under_autocast(loss):
    a, b, seen = local(4, 5, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(a, b, seen)
    assert value.dtype == torch.float32 and torch.equal(value, loss(a, b, seen))


# --- ranks and micro-batches -----------------------------------------------------------------------------

LOSSES = {"simclr": (nt_xent, dense_nt_xent), "vicreg": (vicreg_loss, dense_vicreg)}
BATCH = 8


def gradient(
    method: str, world: distributed.World, micro_batch: int | None = None, weight: float = 0.7
) -> torch.Tensor:
    """The gradient of one step over this rank's share, without batch statistics, which are per rank."""
    torch.manual_seed(1)
    backbone = build_backbone("test_resnet")
    stage, channels, cells = choose_map(backbone, "test_resnet", 32, 16)
    head = DenseHead(stage, cells, build_projector([channels, 24, 16], last_norm=False))
    width = backbone.num_features
    projector = build_projector([width, 24, 16], last_norm=False)
    model = Encoder(Normalise([0.5] * 3, [0.3] * 3), backbone, projector, method == "simclr", head)
    keep_statistics(model)
    generator = torch.Generator().manual_seed(2)
    views = torch.randint(0, 256, (2, BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    moves = torch.eye(2, 3) + 0.7 * torch.randn(BATCH, 2, 3, generator=generator)
    assert 0.2 < shown(moves, cells).float().mean() < 0.8
    share = distributed.per_rank(BATCH, world)
    own = [part[world.rank * share : (world.rank + 1) * share] for part in (*views, moves)]
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    cache = GradCache(wrapped, micro_batch, nullcontext) if micro_batch else None
    parts = (cache.embed if cache else wrapped)(*own)
    whole = with_dense(*LOSSES[method], weight)
    loss, _ = whole(*(distributed.all_gather(part) for part in (*parts, own[2])))
    loss.backward()
    if cache:
        cache.carry()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def rank_main(folder) -> None:
    world = distributed.start("cpu")
    found = {f"{method} {m}": gradient(method, world, m) for method in LOSSES for m in (None, 2)}
    torch.save(found, folder / f"{world.rank}.pt")
    distributed.stop()


@pytest.fixture(scope="module")
def alone():
    return {method: gradient(method, distributed.World()) for method in LOSSES}


def test_two_ranks_have_the_gradient_of_one_in_micro_batches_too(alone, tmp_path):
    with Ranks(rank_main, tmp_path, size=2, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses() == [0, 0], ranks.log() + ranks.log(1)
    for rank in range(2):
        for name, found in torch.load(tmp_path / f"{rank}.pt").items():
            expected = alone[name.split()[0]]
            assert f"{found.norm() / expected.norm():.4f}" == "1.0000", name
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_the_term_reaches_the_backbone(alone):
    plain = gradient("simclr", distributed.World(), weight=0.0)
    first = build_backbone("test_resnet").conv1[0].weight.numel()
    assert (alone["simclr"] - plain)[:first].norm() > 0.01 * plain[:first].norm()


# --- runs ------------------------------------------------------------------------------------------------


def config_of(config_class, sheets, folder, **changes):
    return config_class(
        data_dir=sheets / "unlabeled",
        exp_dir=folder,
        arch="test_resnet",
        projector=(16, 16),
        batch_size=8,
        image_size=64,
        window=96,
        workers=0,
        log_every=1,
        device="cpu",
        warmup_epochs=0.0,
        min_lr_ratio=1.0,
        **{"steps": 4, **changes},
    )


def outcome(config):
    lines = [json.loads(line) for line in (config.exp_dir / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(config.exp_dir / "backbone.safetensors")


@pytest.mark.parametrize(
    ("method", "config_class", "micro_batch"), [(simclr, SimCLRConfig, 4), (vicreg, VICRegConfig, None)]
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    method, config_class, micro_batch, sheets, tmp_path, capfd
):
    changes = {"dense_weight": 0.5, "recipe": "simclr", "micro_batch": micro_batch}
    config = config_of(config_class, sheets, tmp_path / "whole", **changes)
    method.main(config)
    assert "dense term: weight 0.5, at 4 x 4 places of a view, on map 3" in capfd.readouterr().out
    parts = dataclasses.replace(config, exp_dir=tmp_path / "parts")
    method.main(dataclasses.replace(parts, steps=2))
    method.main(parts)
    (lines, weights), (resumed, others) = outcome(config), outcome(parts)
    assert lines == resumed and all(torch.equal(weights[name], others[name]) for name in weights)
    assert all(line["dense"] > 0 and 0 < line["dense_seen"] < 1 for line in lines)
    assert weights.keys() == build_backbone("test_resnet").state_dict().keys()
    meta = read_backbone(config.exp_dir / "backbone.safetensors")[1]
    assert (meta["dense_weight"], meta["dense_stride"]) == (0.5, 16)
    with pytest.raises(UserError, match=r"--dense-weight 0.0: the run in .* has 0.5"):
        method.main(dataclasses.replace(parts, steps=5, dense_weight=0.0))


def test_off_leaves_nothing_anywhere_and_on_begins_with_the_same_weights_and_views(sheets, tmp_path):
    off = config_of(SimCLRConfig, sheets, tmp_path / "off", steps=1)
    on = dataclasses.replace(off, exp_dir=tmp_path / "on", dense_weight=1.0)
    simclr.main(off)
    simclr.main(on)
    begun = [checkpoint.read(c.exp_dir / "checkpoints" / "step_00000000.pt")["encoder"] for c in (off, on)]
    assert {name.split(".")[0] for name in begun[1].keys() - begun[0].keys()} == {"dense"}
    assert all(torch.equal(begun[1][name], value) for name, value in begun[0].items())
    (plain,), (dense,) = outcome(off)[0], outcome(on)[0]
    assert dense.keys() - plain.keys() == {"dense", "dense_seen"}
    assert dense["loss"] == pytest.approx(plain["loss"] + dense["dense"], rel=1e-5)
    assert not [name for name in read_backbone(off.exp_dir / "backbone.safetensors")[1] if "dense" in name]

    saved = json.loads((off.exp_dir / "config.json").read_text())
    del saved["dense_weight"], saved["dense_stride"]  # as a version without the flags left it
    (off.exp_dir / "config.json").write_text(json.dumps(saved))
    simclr.main(dataclasses.replace(off, steps=2))
    assert len(outcome(off)[0]) == 2


def test_what_cannot_work_is_one_line(sheets, tmp_path):
    config = config_of(SimCLRConfig, sheets, tmp_path / "run", dense_weight=0.5)
    with pytest.raises(UserError, match="--dense-stride 1: no map of test_resnet has 2 x 2 such cells"):
        simclr.main(dataclasses.replace(config, dense_stride=1))
    with pytest.raises(UserError, match=r"--dense-weight -1\.0: give 0 or more"):
        dataclasses.replace(config, dense_weight=-1.0)
    method = Method(name="other", loss=nt_xent, joint=True, last_norm=True, base_lr=simclr.base_lr)
    with pytest.raises(UserError, match=r"--dense-weight 0\.5: other has no dense term; leave it out"):
        pretrain(config, method)
    assert not os.path.exists(config.exp_dir / "backbone.safetensors")
