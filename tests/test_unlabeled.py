"""Unlabelled windows: pairs of which one is the other by a known map, a function of the step; and runs.

A run is exactly one without them until its burn-in ends, resumes to the last bit, and keeps the better model.
"""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from processes import Ranks
from small_detector import small_spec
from small_finetuning import config_of, lines_of, weights_of

from cluster import checkpoint
from cluster.batches import Batches
from cluster.distributed import World
from cluster.errors import UserError
from detection import loop, teacher, unlabeled
from detection.data import Augment, TrainingWindows, collate
from detection.finetune import main
from detection.memory import Footprint, fit_to_memory
from detection.pseudo import PseudoConfig
from detection.pseudo import main as draw
from detection.sheets import SheetReader
from detection.unlabeled import UnlabelledWindows, beside, known_labels, same_sheets
from schematics.coco import find_split, read_split
from schematics.sheets import DataError, Sheet, find_sheets
from schematics.store import WindowStore, build_store

pytestmark = pytest.mark.usefixtures("one_thread")
SIX = {"arch": "test_resnet", "fpn_channels": 16, "window": 128, "steps": 6, "norm": "group"}
FULL = Augment(shift=True, scale=0.3, photometric=0.0, flip=True, rot90=True)


@pytest.fixture(scope="module")
def marked(tmp_path_factory) -> WindowStore:
    """The store of a sheet with one black box on light gray paper, windows of 200 px."""
    folder = tmp_path_factory.mktemp("marked")
    sheet = np.full((220, 260), 230, np.uint8)
    sheet[90:120, 110:160] = 0
    (folder / "sheets").mkdir()
    cv2.imwrite(str(folder / "sheets" / "a.png"), sheet)
    return build_store(folder / "sheets", folder / "store", side=200, stride=40)


def black(window: torch.Tensor) -> torch.Tensor:
    """The box around what is dark in a window [3, S, S]: [1, 4]."""
    rows, columns = (np.flatnonzero((window[0].numpy() < 100).any(axis)) for axis in (1, 0))
    return torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]).float()


def pool_of(store: WindowStore, augment: Augment = FULL, **changes) -> UnlabelledWindows:
    facts = {"side": 128, "color_mode": "gray", "seed": 3, "left_out": set(), "known": {}}
    return UnlabelledWindows(store, augment=augment, **facts | changes)


def test_a_box_of_the_first_window_lies_where_the_map_says_in_the_second(marked, monkeypatch):
    monkeypatch.setattr(unlabeled, "PATCHES", 0)
    pool = pool_of(marked)
    sizes = set()
    for place in range(48):
        sample = pool[0, place, place % len(pool)]
        moved = teacher.moved(black(sample["weak"]), sample["matrix"])
        torch.testing.assert_close(moved, black(sample["strong"]), rtol=0, atol=2.5)
        sizes.add(tuple(sample["matrix"][:, :2].sign().flatten().tolist()))
    assert len(sizes) == 8, "quarter turns and mirrors"


def test_without_changes_both_windows_are_the_same_and_each_is_a_function_of_its_key(marked):
    still, pool = pool_of(marked, Augment(shift=True)), pool_of(marked)
    sample = still[0, 3, 1]
    assert torch.equal(sample["matrix"], torch.tensor([[1.0, 0, 0], [0, 1, 0]]))
    differs = sample["weak"] != sample["strong"]
    assert (sample["strong"][differs] == 230).all(), "only paper is laid over it"
    for key in ((0, 3, 1), (5, 0, 0)):
        one, again = pool[key], pool_of(marked)[key]
        for name in ("weak", "strong", "matrix", "jitter"):
            assert torch.equal(one[name], again[name])
        assert one["seed"] == again["seed"]
    assert not torch.equal(pool[0, 3, 1]["strong"], pool[1, 3, 1]["strong"])


def test_patches_have_the_color_of_the_paper_and_leave_most_of_a_symbol():
    window = np.zeros((100, 100, 3), np.uint8)
    laid = unlabeled.erase(window, (200, 190, 180), np.random.default_rng(1))
    patches = laid.any(2)
    assert not window.any() and 0 < patches.mean() < 0.12
    assert (laid[patches] == (200, 190, 180)).all()
    shadow = np.arange(10000, dtype=np.uint32).reshape(100, 100).astype(np.uint8)
    nearby = unlabeled.erase(np.full_like(shadow, 7), shadow, np.random.default_rng(1))
    assert set(np.unique(nearby[nearby != 7])) <= set(np.unique(shadow)), "the paper of each place"
    assert (nearby == shadow)[nearby != 7].all()


def batches_of(sheets: Path, folder: Path, world: World, size: int = 4):
    train = read_split(find_split(sheets, "train"))
    spec = small_spec(categories=tuple((c.id, c.name) for c in train.categories))
    windows = TrainingWindows(SheetReader(train, "gray"), 128, 32, 0, Augment())
    own = Batches(windows, windows.order, 3, 2, world, 0, collate)
    return beside(own, windows, spec, [train], sheets / "unlabeled", size, folder)


def test_batches_of_the_pool_begin_at_a_step_and_ranks_share_them(sheets, tmp_path):
    whole, _ = batches_of(sheets, tmp_path, World())
    begun = replace(whole, begin=2)
    assert [[len(key) for key in keys] for keys in begun.keys(0, 4)] == [[3] * 2] * 2 + [
        [4] * 4 + [3] * 2
    ] * 2
    assert list(begun.keys(3, 5)) == list(begun.keys(0, 5))[3:], "wherever a run goes on"
    halves = [replace(batches_of(sheets, tmp_path, World(n, 2))[0], begin=2).keys(0, 4) for n in (0, 1)]
    for one, *shares in zip(begun.keys(0, 4), *halves, strict=True):
        assert sorted(one) == sorted(itertools.chain(*shares))
    (_, plain), (_, (images, targets, seeds, pool)) = begun.between(1, 3)
    assert len(plain) == 3 and len(images) == len(targets) == len(seeds) == 2
    assert pool["weak"].shape == pool["strong"].shape == (4, 3, 128, 128)
    assert pool["matrix"].shape == (4, 2, 3) and pool["truth"] == [None] * 4
    # After a rollback the data of later batches is taken, but the burn-in ends at the same step.
    assert [len(batch) for _, batch in begun.between(1, 3, offset=5)] == [3, 4]


def test_sheets_that_are_labelled_ones_are_left_out_by_content(sheets, tmp_path):
    train = find_sheets(sheets / "train")
    shutil.copy(train[2].path, tmp_path / "renamed.png")
    shutil.copy(find_sheets(sheets / "unlabeled")[0].path, tmp_path / "new.png")
    (tmp_path / "same size.png").write_bytes(bytes(train[2].path.stat().st_size))
    (tmp_path / "link.png").symlink_to("nowhere.png")
    pool = [Sheet(path) for path in sorted(tmp_path.iterdir())]
    assert same_sheets(pool, train) == {(tmp_path / "renamed.png").as_posix()}
    store = build_store(sheets / "unlabeled", tmp_path / "store", 128)
    some = set(store.sheet_names[:3])
    pool = pool_of(store, left_out=some)
    assert not some & {pool.source((0, 0, n)).split(" @")[0] for n in range(len(pool))}
    with pytest.raises(DataError, match="all 8 sheets are labelled ones"):
        pool_of(store, left_out=set(store.sheet_names))


def test_labels_of_the_pool_are_read_in_the_detector_s_numbers_to_measure_with(sheets, tmp_path):
    split = read_split(find_split(sheets, "train"))
    names = [category.name for category in split.categories]
    spec = small_spec(categories=tuple(enumerate(reversed(names), start=1)))
    known, said = known_labels(sheets / "train", spec)
    assert len(known) == 8 and "nothing is trained on them" in said
    for sheet in split.sheets:
        theirs = [spec.categories[label - 1][1] for label in known[sheet.file.name].labels]
        assert theirs == [names[label - 1] for label in sheet.labels]
    store = build_store(sheets / "train", tmp_path / "store", 128)
    sample = pool_of(store, known=known)[0, 0, 0]
    assert len(sample["truth"]["boxes"]) == len(sample["truth"]["labels"])
    assert known_labels(sheets / "unlabeled", spec)[0] == {}
    empty = tmp_path / "empty"
    shutil.copytree(sheets / "train", empty)
    file = empty / "_annotations.coco.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"annotations": []}))
    known, said = known_labels(empty, spec)
    assert known == {} and "measure nothing" in said


def test_memory_is_fitted_with_the_windows_of_the_pool(sheets):
    labelled = read_split(find_split(sheets, "train")).sheets
    footprint = Footprint(fixed=0, window=0, pixel=10, anchors=0)
    free = footprint.need(128, 8, 0) * 2
    alone = fit_to_memory(footprint, 128, 32, labelled, None, None, 1, free)
    both = fit_to_memory(footprint, 128, 32, labelled, None, None, 1, free, lambda batch: 2 * batch)
    assert (alone.batch, both.batch, both.unlabelled) == (8, 4, 8)
    assert both.need == 12 * alone.need // 8 and "and 8 unlabelled ones" in str(both)


@pytest.fixture
def believing(monkeypatch):
    """A teacher after two steps is sure of nothing. So whatever scores 0.05 counts as sure here."""
    for name in ("FAINT", "FIRST", "LEAST"):
        monkeypatch.setattr(teacher, name, 0.05)


def config_with_pool(sheets: Path, exp_dir: Path, **changes):
    flags = {
        "unlabeled": sheets / "train",
        "train_share": 0.5,
        "burn_in": 0.34,
        "validate_every": 1,
        "lr": 1e-3,
    }
    return config_of(sheets, exp_dir, **{**SIX, **flags, **changes})


def test_a_run_with_a_pool_is_one_without_until_then_and_goes_on_to_the_last_bit(
    sheets, tmp_path, believing, capsys
):
    plain = config_with_pool(sheets, tmp_path / "plain", unlabeled=None, ema_decay=0.999, steps=2)
    main(plain)
    capsys.readouterr()
    config = config_with_pool(sheets, tmp_path / "runs" / "taught", checkpoint_every=0.0, keep=9)
    main(config)
    printed = capsys.readouterr().out
    assert "4 sheets of" in printed and "are among the labelled ones and left out" in printed
    assert "they measure the teacher's, nothing is trained on them" in printed
    own, lines = (lines_of(exp_dir) for exp_dir in (plain.exp_dir, config.exp_dir))
    assert [line for line in lines if line["step"] < 2] == [line for line in own if line["step"] < 2]
    steps = [line for line in lines if "loss" in line]
    assert ["teacher_classifier" in line for line in steps] == [False] * 2 + [True] * 4
    assert all(line["teacher_classifier"] > 0 and line["pseudo_labels"] > 0 for line in steps[2:])
    judged = [line for line in lines if "valid_AP_burn_in" in line]
    assert judged and all(f"pseudo_threshold/{name}" in judged[-1] for name in ("diode", "resistor"))

    # Killed after step 4, amid the teaching.
    files = {name: weights_of(config.exp_dir / name) for name in ("model.pt", "last.pt")}
    told = checkpoint.check_final(config.exp_dir)["told"]
    (config.exp_dir / "final.json").unlink()
    for step, path in checkpoint.listed(config.exp_dir / "checkpoints"):
        if step > 4:
            path.unlink()
    main(replace(config, workers=1))
    assert "going on at step 4" in capsys.readouterr().out
    assert lines_of(config.exp_dir) == lines
    for name, weights in files.items():
        again = weights_of(config.exp_dir / name)
        assert all(torch.equal(weights[key], again[key]) for key in weights)
    assert checkpoint.check_final(config.exp_dir)["told"] == told

    with pytest.raises(UserError, match="was begun with it; do so again, or give another"):
        main(replace(config, unlabeled=None, steps=8))


def test_two_processes_take_the_steps_of_one(sheets, tmp_path):
    flags = {"burn_in": 0.25, "steps": 4, "unlabeled_batch": 4, "validate_every": 9}
    one = config_with_pool(sheets, tmp_path / "one", **flags)
    main(one)
    two = config_with_pool(sheets, tmp_path / "two", **flags)
    with Ranks(main, two, size=2, logs=tmp_path / "logs") as ranks:
        assert ranks.statuses(120) == [0, 0], ranks.log() + ranks.log(1)
    first, second = ([line for line in lines_of(run.exp_dir) if "loss" in line] for run in (one, two))
    assert len(first) == 4 and "pseudo_labels" in first[-1]
    for line, other in zip(first, second, strict=True):
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
    odd = replace(two, exp_dir=tmp_path / "odd", unlabeled_batch=3)
    with Ranks(main, odd, size=2, logs=tmp_path / "odd logs") as ranks:
        ranks.statuses(60)
    assert "--unlabeled-batch 3 is not divisible by 2 ranks" in ranks.log() + ranks.log(1)


def test_a_run_that_gets_worse_says_so_and_model_pt_is_that_of_the_burn_in(
    sheets, tmp_path, monkeypatch, capsys
):
    """The validations are real, but their AP is made to fall after the burn-in."""
    fall = iter([0.4, 0.3, 0.2])

    def falling(*arguments, **flags):
        figures, *rest = judge(*arguments, **flags)
        figures.fitted["AP"] = next(fall)
        return figures, *rest

    judge = loop.validate
    monkeypatch.setattr(loop, "validate", falling)
    config = config_with_pool(sheets, tmp_path / "run", steps=6, burn_in=0.5, validate_every=1)
    main(config)
    printed = capsys.readouterr().out
    assert "worse than at the end of the burn-in (AP 0.400, step 3)" in printed
    signed = checkpoint.check_final(config.exp_dir)
    assert signed["told"] in printed and "never more with the teacher's labels" in signed["told"]
    assert checkpoint.read(config.exp_dir / "model.pt")["step"] == 3
    assert checkpoint.read(config.exp_dir / "last.pt")["step"] == 6


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"unlabeled": Path("nowhere")}, DataError, "nowhere: no such file or folder"),
        ({"unlabeled": Path(__file__).parent / "faults"}, DataError, "no drawings found"),
        ({"burn_in": 0.0}, UserError, "--burn-in 0.0: give 0.001 or more"),
    ],
)
def test_a_wrong_pool_is_one_line_and_leaves_no_folder(sheets, tmp_path, changes, error, said):
    with pytest.raises(error, match=said) as raised:
        main(config_with_pool(sheets, tmp_path / "run", **changes))
    assert "\n" not in str(raised.value) and not (tmp_path / "run").exists()


def test_the_command_draws_what_the_teacher_of_a_run_makes_of_its_pool(sheets, tmp_path, believing, capsys):
    config = config_with_pool(sheets, tmp_path / "runs" / "run", steps=3)
    main(config)
    capsys.readouterr()
    out = tmp_path / "pseudo.png"
    draw(PseudoConfig(run=config.exp_dir, out=out, count=3))
    assert capsys.readouterr().out.startswith(f"{out}: 3 windows, step 3, thresholds 0.05 to ")
    picture = cv2.imread(str(out))
    assert picture.shape == (2 * (4 * 128 + 6), 2 * (8 * 128 + 6), 3)
    sure = (picture == (0, 120, 230)).all(2) | (picture == (60, 150, 0)).all(2)  # BGR
    assert sure.sum() > 100
    with pytest.raises(UserError, match="no checkpoint of a finetuning with --unlabeled"):
        draw(PseudoConfig(run=tmp_path, out=out))
