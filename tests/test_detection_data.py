"""Training windows: boxes stay on their symbols, draws are by seed and sample, ranks share a global batch."""

from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from cluster.batches import Batches
from cluster.distributed import World
from cluster.errors import UserError
from detection import sheets, start
from detection.data import (
    KEEP,
    Augment,
    TrainingWindows,
    collate,
    crop_boxes,
    photometric,
    resize,
    steps_per_epoch,
    turn,
)
from detection.model import as_tensor
from detection.plan import boxes_per_window, fit_colors, fit_overlap, fit_window, large_side, plan_detector
from detection.schedule import Phase, continue_phases, lr_at
from detection.sheets import SheetReader, cached_bytes, decoded_bytes, pack_split
from schematics import workers
from schematics.coco import Category, read_split, write_split
from schematics.sheets import DataError


def keys_of(windows, batch_size, first, last, rank=0, size=1):
    """The keys of a rank's share of batches first to last - 1, as finetuning takes them."""
    order = partial(windows.order, at_least=batch_size)
    world = World(rank=rank, size=size)
    batches = Batches(windows, order, steps_per_epoch(windows, batch_size), batch_size, world)
    return batches.keys(first, last)


EVERYTHING = Augment(shift=True, scale=0.2, photometric=0.5, flip=True, rot90=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A large sheet with twelve filled squares of 40 px, a small one with one, and a large blank one."""
    folder = tmp_path_factory.mktemp("data") / "train"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number, (width, height, count) in enumerate([(700, 500, 12), (120, 100, 1), (600, 600, 0)], start=1):
        sheet = np.full((height, width), 255, np.uint8)
        for place in rng.permutation((width // 60) * (height // 60))[:count]:
            x, y = 60 * int(place % (width // 60)) + 5, 60 * int(place // (width // 60)) + 5
            cv2.rectangle(sheet, (x, y), (x + 39, y + 39), 0, -1)
            annotations.append(
                {"image_id": number, "category_id": 5 + int(place) % 2, "bbox": [x, y, 40, 40]}
            )
        cv2.imwrite(str(folder / f"{number}.png"), sheet)
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    write_split(folder, images, [Category(5, "relay"), Category(6, "lamp")], annotations)
    return read_split(folder)


def training_windows(split, augment=EVERYTHING, **options):
    return TrainingWindows(SheetReader(split, "gray"), 256, 64, seed=3, augment=augment, **options)


def equal(one, other):
    (image, target, seed), (image2, target2, seed2) = one, other
    same = torch.equal(image, image2) and seed == seed2
    return same and all(torch.equal(target[key], target2[key]) for key in target)


def test_a_sample_is_a_function_of_seed_epoch_and_sample(split):
    first, again = training_windows(split), training_windows(split)
    keys = [key for batch in keys_of(first, 4, 0, 6) for key in batch]
    items = {key: first[key] for key in keys}
    assert all(equal(items[key], again[key]) for key in reversed(keys))
    epoch, position, tile = keys[0]
    assert not equal(items[keys[0]], first[epoch + 1, position, tile])


def test_ranks_share_the_batches_of_one_process_at_any_step(split):
    windows = training_windows(split)
    whole = list(keys_of(windows, 4, 0, 9))
    shares = [list(keys_of(windows, 4, 3, 9, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole[3:]
    per_epoch = steps_per_epoch(windows, 4)
    first, second = ([tile for b in whole[n * per_epoch :][:per_epoch] for _, _, tile in b] for n in range(2))
    assert first != second


def test_boxes_frame_their_symbols_whatever_was_done_to_the_window(split):
    windows = training_windows(split, Augment(shift=True, scale=0.2, flip=True, rot90=True))
    seen = 0
    for batch in keys_of(windows, 4, 0, 12):
        for key in batch:
            image, target, _ = windows[key]
            assert image.shape == (3, 256, 256) and image.dtype == torch.uint8
            for x0, y0, x1, y1 in target["boxes"].tolist():
                inside = image[0, round(y0) + 1 : round(y1) - 1, round(x0) + 1 : round(x1) - 1]
                assert inside.numel() and inside.max() < 128
                around = image[
                    0, max(0, round(y0) - 5) : round(y1) + 5, max(0, round(x0) - 5) : round(x1) + 5
                ]
                ink = int((around < 128).sum())
                assert ink == pytest.approx((x1 - x0) * (y1 - y0), rel=0.12)
                seen += 1
    assert seen > 30


def test_a_symbol_cut_by_the_edge_is_a_target_while_enough_of_it_remains():
    boxes, labels = np.array([[0.0, 0, 20, 20], [10, 10, 30, 30], [90, 90, 110, 110]]), np.array([1, 2, 3])
    kept, names = crop_boxes(boxes, labels, x=12, y=5, side=100, keep=KEEP)
    assert names.tolist() == [2, 3], "the first keeps 0.3 of its area"
    assert kept.tolist() == [[0, 5, 18, 25], [78, 85, 98, 100]]
    assert crop_boxes(boxes, labels, 500, 500, 100, KEEP)[0].shape == (0, 4)


def test_windows_without_symbols_are_negatives_in_the_share_asked_for(split):
    labels = [
        [len(windows[key][1]["labels"]) for batch in keys_of(windows, 4, 0, 40) for key in batch]
        for windows in (training_windows(split, negatives=share) for share in (0.0, 0.5))
    ]
    without, some = (np.mean([count == 0 for count in counts]) for counts in labels)
    assert without < some
    assert 0.2 < some < 0.5


def test_rare_classes_are_seen_more_often(split):
    plain, repeated = training_windows(split, negatives=0), training_windows(split, negatives=0, repeat=1.0)
    assert len(repeated) >= len(plain)
    assert repeated.weights.max() > 1 and plain.weights.max() == 1


def test_fewer_windows_than_a_batch_are_repeated(split):
    windows = training_windows(split)
    batch = next(iter(keys_of(windows, 64, 0, 1)))
    assert len(batch) == 64 and {tile for _, _, tile in batch} >= set(np.flatnonzero(windows.weights == 1))


def test_thin_lines_survive_shrinking():
    window = np.full((400, 400), 255, np.uint8)
    window[:, 5::40] = 0
    shrunk, boxes = resize(window, np.array([[40.0, 80, 120, 400]]), 108)
    assert boxes[0] == pytest.approx([10.8, 21.6, 32.4, 108])
    lines = [shrunk[0, round(0.27 * x) - 1 : round(0.27 * x) + 2].min() for x in range(5, 400, 40)]
    assert max(lines) < 240


def test_turns_and_mirrors_are_exact():
    window = np.zeros((64, 64), np.uint8)
    window[10:20, 30:60] = 255
    box = np.array([[30.0, 10, 60, 20]])
    outcomes = set()
    for seed in range(40):
        turned, moved = turn(window, box, np.random.default_rng(seed), flip=True, rot90=True)
        x0, y0, x1, y1 = moved[0].astype(int)
        assert turned[y0:y1, x0:x1].min() == 255 and (turned == 255).sum() == 300 == (x1 - x0) * (y1 - y0)
        outcomes.add((x0, y0, x1, y1))
    assert len(outcomes) == 8
    same, unmoved = turn(window, box, np.random.default_rng(0), flip=False, rot90=False)
    assert same is window and unmoved is box


def test_photometric_changes_every_other_window_and_only_as_asked():
    window = np.full((64, 64), 200, np.uint8)
    assert photometric(window, np.random.default_rng(0), 0.0) is window
    seen = [photometric(window, np.random.default_rng(n), 0.5) for n in range(200)]
    assert 80 <= sum(other is window for other in seen) <= 120
    assert 80 <= sum((other != 200).any() for other in seen) <= 120
    assert all(other.dtype == np.uint8 and other.shape == (64, 64) for other in seen)


@pytest.mark.parametrize("shape", [(128, 128), (128, 128, 3)])
def test_photometric_noise_is_normal_and_no_channel_has_that_of_another(shape):
    window, noisy = np.full(shape, 120, np.uint8), 0
    for n in range(40):
        changed = photometric(window, np.random.default_rng(n), 0.5).astype(float).reshape(128 * 128, -1)
        if changed.std() == 0:
            continue
        noisy += 1
        assert changed.std(0) == pytest.approx(np.full(changed.shape[1], 4), rel=0.05)
        if len(shape) == 3:
            assert np.abs(np.corrcoef(changed.T) - np.eye(3)).max() < 0.05
        again = photometric(window, np.random.default_rng(n), 0.5)
        assert np.array_equal(changed, again.reshape(128 * 128, -1))
    assert 2 <= noisy <= 12


def test_photometric_contrast_and_brightness_are_one_straight_line_of_levels():
    window, straight = np.arange(256, dtype=np.uint8).reshape(16, 16), 0
    for n in range(40):
        rng = np.random.default_rng(n)
        slope, shift = 1 + 0.5 * rng.uniform(-0.5, 0.5), 0.5 * rng.uniform(-50, 50)
        blurred_or_noisy = rng.random() < 0.15, rng.random() < 0.25
        changed = photometric(window, np.random.default_rng(n), 0.5)
        if changed is not window and not any(blurred_or_noisy):
            expected = (window.astype(float) - 128) * slope + 128 + shift
            assert np.abs(changed - (np.clip(expected, 0, 255) - 0.5)).max() <= 0.501
            straight += 1
    assert straight >= 5


def test_every_other_window_keeps_its_native_scale(split):
    windows = training_windows(split, Augment(scale=0.2))
    tile = next(n for n, (sheet, _, _) in enumerate(windows.tiles.tolist()) if sheet == 1)
    corners = [windows[epoch, 0, tile][1]["boxes"][0] for epoch in range(200)]
    sides = torch.stack([box[2:] - box[:2] for box in corners])
    native = (sides == 40).all(1)
    assert 80 <= int(native.sum()) <= 120
    assert sides[~native].min() >= 40 / 1.21 and sides[~native].max() <= 40 * 1.21
    assert len(set(sides[~native][:, 0].tolist())) > 20


def test_gray_becomes_three_channels_and_batches_stack():
    gray, color = np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.uint8)
    assert as_tensor(gray).shape == as_tensor(color).shape == (3, 64, 64)
    images, targets, seeds = collate(
        [(as_tensor(gray), {"labels": 1}, 5), (as_tensor(color), {"labels": 2}, 6)]
    )
    assert images.shape == (2, 3, 64, 64) and len(targets) == 2 and seeds == [5, 6]


def test_a_scaled_sheet_keeps_its_thin_lines_under_its_boxes(split, tmp_path):
    image = np.full((301, 403), 255, np.uint8)
    image[100:150:40, 50:90] = 0  # lines of one pixel, of which skipping pixels would lose half
    cv2.imwrite(str(tmp_path / "a.png"), image)
    given = replace(
        split.sheets[0],
        path=tmp_path / "a.png",
        width=403,
        height=301,
        boxes=np.array([[50.0, 100, 90, 141]]),
        labels=np.array([1]),
        crowd=np.zeros(1, bool),
    )
    reader = SheetReader(replace(split, sheets=[given]), "gray", scale=0.5)
    seen, sheet = reader[0][0], reader.split.sheets[0]
    assert seen.shape == (sheet.height, sheet.width) == (150, 202)
    np.testing.assert_allclose(sheet.boxes, given.boxes * [202 / 403, 150 / 301, 202 / 403, 150 / 301])
    x0, y0, x1, y1 = sheet.boxes[0].round().astype(int).tolist()
    dark = np.argwhere(seen < 250)
    assert set(dark[:, 0]) <= {*range(y0 - 1, y0 + 2), *range(y1 - 2, y1 + 1)}
    assert all((seen[y - 1 : y + 2, x0 + 1 : x1 - 1].min(0) < 200).all() for y in (y0, y1 - 1))


def test_windows_and_overlap_fit_the_symbols(split):
    assert large_side(split.sheets) == 40
    assert fit_window(split.sheets) == 384
    assert fit_overlap(split.sheets, 256) == 56
    choices = {"arch": "resnet18", "norm": "sync", "head": "mlp", "fpn_channels": 64, "overlap": None}
    spec = plan_detector(split, {}, window=256, detections=None, score_threshold=0.01, **choices)
    assert (spec.window, spec.overlap, spec.color_mode) == (256, 56, "gray")
    assert spec.categories == ((5, "relay"), (6, "lamp"))
    assert 0.9 < spec.mean[0] < 1.0 and spec.mean[0] == spec.mean[2]
    given = plan_detector(
        split,
        {"color_mode": "rgb", "mean": [0.5] * 3, "std": [0.1] * 3},
        window=256,
        detections=7,
        score_threshold=0.01,
        **choices,
    )
    assert (given.color_mode, given.mean, given.detections) == ("rgb", (0.5,) * 3, 7)


def test_the_window_covers_the_sheets_with_few_pixels(split):
    """Sheets that fit into a window are whole in it, and a few large sheets don't make all windows large."""

    def sized(*sizes):
        return [replace(split.sheets[0], width=width, height=height) for width, height in sizes]

    assert fit_window(sized((500, 400), (480, 500))) == 512, "each whole"
    assert fit_window(sized((5000, 4000))) == 896, "a large sheet: neighbours share little"
    assert fit_window(sized(*[(500, 400)] * 20, (1000, 800))) == 512, "most of them whole"
    assert fit_window(sized((120, 100))) == 128, "no larger than the sheets, whatever the symbols"


def test_a_title_block_does_not_make_the_window_the_sheet(split):
    title = np.array([[0.0, 0, 2000, 2000]])
    large = [
        replace(
            split.sheets[0],
            width=5000,
            height=4000,
            boxes=title,
            labels=np.array([1]),
            crowd=np.zeros(1, bool),
        )
    ]
    assert fit_window(large) == 2048
    choices = {"arch": "resnet18", "norm": "sync", "head": "mlp", "fpn_channels": 64, "detections": None}
    one = replace(split, sheets=large)
    meta = {"color_mode": "gray", "mean": [0.9] * 3, "std": [0.2] * 3}
    with pytest.raises(UserError, match="--window 256: no window shows 60% of any symbol"):
        plan_detector(one, meta, window=256, overlap=None, score_threshold=0.01, **choices)
    with pytest.raises(UserError, match="--overlap 250: give 0 to 192"):
        plan_detector(split, meta, window=256, overlap=250, score_threshold=0.01, **choices)
    with pytest.raises(UserError, match="--window 0"):
        plan_detector(split, meta, window=0, overlap=None, score_threshold=0.01, **choices)


def test_crowds_are_not_among_the_boxes_of_a_window(split):
    """Training leaves them out, so they ask for no proposals and no detections either."""
    boxes = np.array([[10.0 * n, 0, 10.0 * n + 9, 9] for n in range(8)])
    crowd = np.arange(8) % 2 == 0
    sheet = replace(split.sheets[0], width=100, height=50, boxes=boxes, labels=np.ones(8, int), crowd=crowd)
    assert boxes_per_window([sheet, replace(sheet, crowd=~np.zeros(8, bool))], 128, 16) == [4, 0]


def test_colors_are_measured_exactly_on_large_sheets(split, tmp_path):
    sheet = np.full((3000, 4000, 3), (200, 220, 255), np.uint8)
    sheet[:300] = 0
    cv2.imwrite(str(tmp_path / "a.png"), sheet[..., ::-1])
    large = replace(split.sheets[0], path=tmp_path / "a.png", width=4000, height=3000)
    mean, std = fit_colors(replace(split, sheets=[large]), "rgb")
    assert mean == pytest.approx([0.9 * 200 / 255, 0.9 * 220 / 255, 0.9], abs=1e-9)
    assert std == pytest.approx([0.3 * 200 / 255, 0.3 * 220 / 255, 0.3], abs=1e-9)


def test_a_damaged_sheet_shows_before_training_though_it_fits_no_cache(split, tmp_path):
    data = bytearray(split.sheets[2].path.read_bytes())
    data[len(data) // 2 :] = b""
    (tmp_path / "cut.png").write_bytes(data)
    sheets = [*split.sheets[:2], replace(split.sheets[2], path=tmp_path / "cut.png")]
    with pytest.raises(DataError, match=r"cut\.png"):
        SheetReader(replace(split, sheets=sheets), "gray", cache_bytes=0).preload()


def test_sheets_read_in_processes_are_those_read_here_and_a_damaged_one_shows_as_well(
    split, tmp_path, monkeypatch
):
    """At half size, and with room for the first sheet and the small one alone."""
    monkeypatch.setattr(workers, "WORTH", 1)
    monkeypatch.setattr(sheets, "cores", lambda: 2)
    here, there = (SheetReader(split, "rgb", cache_bytes=280_000, scale=0.5) for _ in range(2))
    expected = [here[index] for index in range(3)]
    assert list(there.preload().cache) == list(here.cache) == [0, 1] and there.free == here.free
    for index, (image, paper) in enumerate(expected):
        assert np.array_equal(there[index][0], image) and there[index][1] == paper
    (tmp_path / "cut.png").write_bytes(split.sheets[2].path.read_bytes()[:300])
    damaged = replace(split, sheets=[*split.sheets[:2], replace(split.sheets[2], path=tmp_path / "cut.png")])
    with pytest.raises(DataError, match=r"cut\.png"):
        SheetReader(damaged, "gray").preload()


def test_sheets_of_a_store_give_the_very_windows_of_sheets_in_memory(split, tmp_path):
    """Gray ones and one in color, at full and at half size, whatever the detector sees."""
    color = cv2.imread(str(split.sheets[0].path))
    color[200:260, 300:390] = (40, 90, 200)
    cv2.imwrite(str(tmp_path / "color.png"), color)
    sheets = [replace(split.sheets[0], path=tmp_path / "color.png"), *split.sheets[1:]]
    mixed = replace(split, sheets=sheets)
    for mode, scale in (("gray", 1.0), ("rgb", 1.0), ("rgb", 0.45)):
        store = pack_split(mixed, mode, scale, tmp_path)
        assert store.parent == tmp_path and store == pack_split(mixed, mode, scale, tmp_path)
        readers = SheetReader(mixed, mode, scale=scale), SheetReader(mixed, mode, scale=scale, store=store)
        for n in range(3):
            (image, paper), (image2, paper2) = readers[0][n], readers[1][n]
            np.testing.assert_array_equal(image, image2)
            assert paper == paper2
        kept, stored = (TrainingWindows(reader, 256, 64, 3, EVERYTHING) for reader in readers)
        for place, tile in enumerate(kept.order(0)):
            assert equal(kept[0, place, int(tile)], stored[0, place, int(tile)])
    assert len(list(tmp_path.glob("sheets-*"))) == 3


def test_sheets_get_a_store_where_they_do_not_fit_into_memory(split, tmp_path, monkeypatch, capsys):
    size = decoded_bytes(split, "gray", 0.5)
    assert size == 350 * 250 + 60 * 50 + 300 * 300 == cached_bytes(split, "gray", 0.5)
    monkeypatch.setattr(start, "CACHE", size)
    kept = start.open_sheets(split, "gray", 0.5, tmp_path, World())
    assert len(kept.cache) == 3 and not list(tmp_path.iterdir())
    monkeypatch.setattr(start, "CACHE", size - 1)
    stored = start.open_sheets(split, "gray", 0.5, tmp_path, World())
    assert not stored.cache and f"3 sheets packed in {tmp_path}" in capsys.readouterr().out
    np.testing.assert_array_equal(kept[0][0], stored[0][0])


def test_a_damaged_sheet_leaves_no_store_and_is_named(split, tmp_path):
    data = split.sheets[2].path.read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    wrong = replace(split.sheets[1], width=121)
    for sheet, said in ((replace(split.sheets[2], path=tmp_path / "cut.png"), "cut.png"), (wrong, "header")):
        with pytest.raises(DataError, match=said):
            pack_split(replace(split, sheets=[split.sheets[0], sheet]), "gray", 1.0, tmp_path / "stores")
    assert not list((tmp_path / "stores").iterdir())


def test_the_learning_rate_is_a_function_of_the_step():
    step = [Phase(0, 0.1, "step", step_size=10, gamma=0.1, stop=100)]
    assert [lr_at(s, step, 4) for s in (0, 2, 4, 9, 10, 25)] == pytest.approx(
        [1e-4, 0.05005, 0.1, 0.1, 0.01, 1e-3]
    )
    cosine = [Phase(0, 0.1, "cosine", 10, 0.1, stop=100)]
    assert [lr_at(s, cosine, 0) for s in (0, 50, 100)] == pytest.approx([0.1, 0.05, 0.0])


def test_a_resumed_run_takes_a_new_constant_rate_and_goes_back_to_steps():
    first = Phase(0, 0.005, "step", step_size=8, gamma=0.1, stop=20)
    phases = continue_phases([], first, 0)
    assert continue_phases(phases, Phase(0, 0.005, "step", 8, 0.1, stop=40), 20) == phases, (
        "longer, else the same"
    )
    constant = continue_phases(phases, Phase(0, 0.002, "constant", 8, 0.1, stop=60), 40)
    back = continue_phases(constant, Phase(0, 0.002, "step", 8, 0.1, stop=70), 60)
    rates = [lr_at(step, back, 0) for step in (0, 8, 39, 40, 59, 60, 67, 68)]
    assert rates == pytest.approx([5e-3, 5e-4, 5e-7, 2e-3, 2e-3, 2e-3, 2e-3, 2e-4])
    assert continue_phases(back, Phase(0, 0.002, "step", 8, 0.1, stop=70), 65) == back
