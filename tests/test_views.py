"""Two views: law 1, the published operations and probabilities, and what `drawing` promises for lines."""

import json
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from schematics import photo, pixels, recipes
from schematics.drafting import draw_sheet
from schematics.draws import Use, draw
from schematics.recipes import PARTS, RECIPES, two_views
from schematics.sheets import to_color
from schematics.store import build_store
from schematics.windows import paper_color

torch.set_num_threads(1)
SHEET = draw_sheet(0, 0)[0]
PHOTO_RGB = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8), (7, 7), 2)
PHOTO_RGB = cv2.normalize(PHOTO_RGB, None, 0, 255, cv2.NORM_MINMAX)


def lines(side, spacing=61, width=2, paper=255, ink=0, vertical=True):
    window = np.full((side, side), paper, np.uint8)
    for at in range(20, side - width, spacing):
        window[:, at : at + width] = ink
    return window if vertical else window.T.copy()


def pairs(window, recipe, count, size=64, **options):
    return [two_views(window, recipe, size, 0, 0, i, **options) for i in range(count)]


# --- law 1 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_number_changes_the_views_and_nothing_else_does(recipe):
    def digest(*numbers):
        return np.concatenate(two_views(SHEET, recipe, 48, *numbers)).tobytes()

    reference = digest(1, 2, 3)
    np.random.seed(5)  # the global generators must not matter
    cv2.setRNGSeed(9)
    digest(8, 8, 8)
    assert digest(1, 2, 3) == reference
    assert len({reference, digest(2, 2, 3), digest(1, 3, 3), digest(1, 2, 4)}) == 4
    first, second = two_views(SHEET, recipe, 48, 1, 2, 3)
    assert not np.array_equal(first, second)


def views_of(sample):
    return np.stack(two_views(SHEET, RECIPES[sample % 3], 40, 7, 1, sample)).tobytes()


def test_workers_and_order_change_nothing():
    alone = [views_of(i) for i in range(12)]
    with ProcessPoolExecutor(2, mp_context=get_context("fork")) as workers:
        backwards = list(workers.map(views_of, reversed(range(12))))
    assert backwards[::-1] == alone


def test_importing_the_recipes_leaves_the_threads_of_opencv_alone():
    code = "import cv2; cv2.setNumThreads(3); import schematics.recipes, schematics.views; "
    code += "print(cv2.getNumThreads())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3"]


# --- parts that are left out -----------------------------------------------------------------------------

EVERY_PART = [(recipe, part) for recipe in RECIPES for part in PARTS[recipe]]
COLORED = cv2.merge([SHEET[:200, :200], np.full((200, 200), 255, np.uint8), SHEET[:200, :200]])


def one_view(recipe, sample, without):
    """A view, and the next number of its generator."""
    rng, region, paper = draw(Use.VIEWS, 0, 0, sample, 1), COLORED, (255, 255, 255)
    if recipe == "drawing":
        view, _ = recipes._drawing_view(region, paper, paper, 40, 48, rng, 1.0, False, without)
    else:
        view, _ = photo.photo_view(region, 48, rng, 1.0, photo.PHOTO[recipe][1], without)
    return to_color(view, "rgb"), rng.integers(2**63)


@pytest.mark.parametrize("recipe, part", EVERY_PART)
def test_a_part_left_out_changes_some_views_and_no_random_number_of_the_others(recipe, part):
    changed = 0
    for sample in range(60):
        (view, number), (less, same) = (one_view(recipe, sample, names) for names in ((), (part,)))
        assert number == same
        changed += not np.array_equal(view, less)
    assert changed >= 1 and (part in ("crop", "jitter") or changed < 60)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_all_parts_both_views_are_the_region(recipe):
    for window in (SHEET[:256, :256], COLORED):
        first, second = two_views(window, recipe, 64, 0, 1, 2, without=PARTS[recipe], extent=128)
        np.testing.assert_array_equal(first, second)
        if recipe != "drawing":
            np.testing.assert_array_equal(first, to_color(pixels.resize(window, 64), "rgb"))


@pytest.mark.parametrize(
    "recipe, part", [("drawing", "invert"), ("simclr", "mirror"), ("vicreg", "solarize")]
)
def test_the_one_part_that_is_left_does_what_its_name_says(recipe, part):
    does = {
        "invert": pixels.invert,
        "mirror": lambda image: cv2.flip(image, 1),
        "solarize": pixels.solarize,
    }[part]
    plain, _ = one_view(recipe, 0, PARTS[recipe])
    rest, seen = [name for name in PARTS[recipe] if name != part], set()
    for sample in range(40):
        view, _ = one_view(recipe, sample, rest)
        seen.add([np.array_equal(view, plain), np.array_equal(view, does(plain))].index(True))
    assert seen == {0, 1}


# --- the published operations ----------------------------------------------------------------------------


def tensor(image):
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


OPERATIONS = [
    (pixels.adjust_brightness, F.adjust_brightness, (0.2, 0.6, 1.4, 1.8), 1),
    (pixels.adjust_contrast, F.adjust_contrast, (0.2, 0.6, 1.4, 1.8), 2),
    (pixels.adjust_saturation, F.adjust_saturation, (0.2, 0.8, 1.2, 1.8), 2),
    (pixels.adjust_hue, F.adjust_hue, (-0.2, -0.1, 0.05, 0.2), 8),
]


@pytest.mark.parametrize(
    "ours, theirs, factors, tolerance", OPERATIONS, ids=lambda x: getattr(x, "__name__", "")
)
def test_color_operations_equal_torchvisions(ours, theirs, factors, tolerance):
    for factor in factors:
        got = ours(PHOTO_RGB, factor).astype(int)
        want = theirs(tensor(PHOTO_RGB), factor).permute(1, 2, 0).numpy().astype(int)
        assert np.abs(got - want).max() <= tolerance  # hue: 256 steps of it, as in Pillow
        assert np.abs(got - want).mean() < 1.2


def test_turning_is_linear_between_pixels_and_paper_beyond_them():
    angle, paper = np.radians(3), (250, 20, 90)
    matrix = np.array([[np.cos(angle), -np.sin(angle), -5], [np.sin(angle), np.cos(angle), 8]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    want = cv2.warpAffine(PHOTO_RGB, matrix, (90, 100), flags=flags, borderValue=paper)
    np.testing.assert_array_equal(pixels.turned(PHOTO_RGB, matrix, 90, 100, paper), want)
    for channel, level in enumerate(paper):
        gray = pixels.turned(np.ascontiguousarray(PHOTO_RGB[..., channel]), matrix, 90, 100, level)
        np.testing.assert_array_equal(gray, want[..., channel])
    assert (want[-1, 0] == paper).all()


def test_gray_and_solarize_equal_torchvisions():
    gray = F.rgb_to_grayscale(tensor(PHOTO_RGB))[0].numpy().astype(int)
    assert np.abs(to_color(PHOTO_RGB, "gray").astype(int) - gray).max() <= 1
    solarized = F.solarize(tensor(PHOTO_RGB), 128).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels.solarize(PHOTO_RGB), solarized)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_equals_torchvisions_with_the_published_kernel(sigma):
    image = cv2.resize(SHEET, (224, 224), interpolation=cv2.INTER_AREA)
    want = F.gaussian_blur(torch.from_numpy(image)[None], [23, 23], [sigma, sigma])[0].numpy().astype(int)
    assert np.abs(pixels.blur(image, sigma).astype(int) - want).max() <= 2


def test_blur_equals_opencvs_but_where_it_rounds_halves():
    rng = np.random.default_rng(0)
    for shape in ((224, 224), (96, 96, 3), (32, 32), (12, 12, 3)):
        image = rng.integers(0, 256, shape, np.uint8)
        for sigma in rng.uniform(0.1, 2.0, 12):
            radius = min(shape[0] // 20, int(np.ceil(3 * sigma)))
            want = cv2.GaussianBlur(image, (2 * radius + 1, 2 * radius + 1), sigma).astype(int)
            apart = np.abs(pixels.blur(image, sigma) - want)
            assert apart.max() <= 1 and apart.mean() < 0.05
        np.testing.assert_array_equal(pixels.blur(np.full_like(image, 255), 1.7), 255)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gray_views_are_a_channel_of_the_views_in_rgb(recipe):
    paper = paper_color(SHEET)
    for sample in range(8):
        gray = two_views(SHEET, recipe, 64, 0, 0, sample, paper=paper, color_mode="gray")
        for one, three in zip(gray, two_views(SHEET, recipe, 64, 0, 0, sample), strict=True):
            assert one.shape == (64, 64) and one.flags.c_contiguous
            np.testing.assert_array_equal(three, np.dstack([one] * 3))


def test_gray_windows_give_what_their_three_equal_channels_give():
    for recipe in ("simclr", "vicreg"):
        for gray, color in zip(
            pairs(SHEET, recipe, 12), pairs(cv2.cvtColor(SHEET, cv2.COLOR_GRAY2RGB), recipe, 12), strict=True
        ):
            assert np.abs(np.array(gray).astype(int) - np.array(color)).max() <= 2


def test_crops_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    image = torch.zeros(1, 300, 400)
    drawn = [RandomResizedCrop.get_params(image, [0.08, 1], [3 / 4, 4 / 3]) for _ in range(1500)]
    theirs = np.array(drawn)[:, [1, 0, 3, 2]]  # (y, x, h, w) -> (x, y, w, h)
    ours = np.array([photo.random_resized_crop(400, 300, draw(Use.VIEWS, 0, 0, i, 0)) for i in range(1500)])
    assert (ours >= 0).all() and (ours[:, :2] + ours[:, 2:] <= [400, 300]).all()
    for q in (10, 25, 50, 75, 90):
        np.testing.assert_allclose(np.percentile(ours, q, axis=0), np.percentile(theirs, q, axis=0), atol=15)


def test_resizing_is_close_to_antialiased_bicubic_and_loses_no_line():
    window = np.full((500, 500), 255, np.uint8)
    window[:, 7::40] = 0  # one pixel wide
    for side in (190, 224, 300, 400, 448, 500):
        crop = window[:side, :side]
        got = pixels.resize(crop, 224).astype(int)
        want = np.asarray(Image.fromarray(crop).resize((224, 224), Image.Resampling.BICUBIC)).astype(int)
        assert got.shape == (224, 224) and np.abs(got - want).mean() < 3
        at = np.arange(7, side - 3, 40) * 224 / side
        assert all(got[0, int(x) - 1 : int(x) + 3].min() < 200 for x in at)


# --- the published probabilities -------------------------------------------------------------------------


def share(flags):
    return np.array(flags).mean(axis=0)


def test_share_of_solarized_and_mirrored_views():
    bright = np.full((64, 64), 220, np.uint8)  # jitter of .4 leaves it above 128
    dark = share([[view.mean() < 128 for view in pair] for pair in pairs(bright, "vicreg", 600, size=32)])
    assert dark[0] == 0 and 0.15 < dark[1] < 0.25
    ramp = np.tile(np.linspace(100, 140, 64).astype(np.uint8), (64, 1))
    for recipe in ("simclr", "vicreg"):
        falling = share(
            [[v[:, :8].mean() > v[:, -8:].mean() for v in pair] for pair in pairs(ramp, recipe, 400, size=32)]
        )
        assert 0.4 < falling[0] < 0.6


def test_share_of_gray_and_of_jittered_views():
    colored = np.full((64, 64, 3), (180, 90, 60), np.uint8)
    for recipe in ("simclr", "vicreg"):
        made = pairs(colored, recipe, 500, size=32)
        gray = share([[np.ptp(view[16, 16]) == 0 for view in pair] for pair in made])
        assert (np.abs(gray - 0.2) < 0.06).all()
        asis = [[(np.abs(v[16, 16].astype(int) - (180, 90, 60)) <= 1).all() for v in pair] for pair in made]
        assert 0.1 < share(asis)[0] < 0.24  # .2 without jitter times .8 in color
    still = pairs(colored, "simclr", 60, size=32, strength=0.0)
    assert all(
        (np.ptp(v[16, 16]) == 0) or np.abs(v[16, 16].astype(int) - (180, 90, 60)).max() <= 3 for v, _ in still
    )


def test_share_of_blurred_views():
    noise = np.random.default_rng(0).integers(60, 200, (400, 400), np.uint8)

    def is_smooth(view):  # neighbours of white noise correlate by .25 after a blur of sigma .5
        rows = view[..., 0].astype(float)
        return np.corrcoef(rows[:, :-1].ravel(), rows[:, 1:].ravel())[0, 1] > 0.25

    seen = (2.0 - 0.5) / (2.0 - 0.1)  # of the sigmas drawn
    for recipe, published in (("simclr", [0.5, 0.5]), ("vicreg", [1.0, 0.1])):
        smooth = share([[is_smooth(view) for view in pair] for pair in pairs(noise, recipe, 400, size=60)])
        np.testing.assert_allclose(smooth, seen * np.array(published), atol=0.07)


# --- what `drawing` promises -----------------------------------------------------------------------------


def contrast(view):
    """Of the strongest ink against the paper, gray levels: works inverted too."""
    gray = to_color(view, "gray").astype(int)
    paper = np.bincount(gray.ravel() // 8).argmax() * 8 + 4
    return np.abs(gray - paper).max()


def test_two_pixel_lines_stay_in_every_drawing_view_and_fade_in_photo_views():
    window = lines(512)
    faint = {}
    for recipe in RECIPES:
        kept = np.array([contrast(v) for pair in pairs(window, recipe, 100, size=224) for v in pair])
        faint[recipe] = (kept < 128).mean()
        if recipe == "drawing":
            assert kept.min() > 80 and np.median(kept) > 190
    assert faint["drawing"] < 0.1 and faint["simclr"] > 0.35 and faint["vicreg"] > 0.3


def test_the_only_line_on_a_large_window_is_in_every_drawing_view():
    window = lines(2000, spacing=2000)
    assert min(contrast(v) for pair in pairs(window, "drawing", 60, size=224) for v in pair) > 60


def test_scale_is_that_of_the_sheet_however_large_the_window():
    for side in (448, 512, 2000):
        window = lines(side, spacing=60)
        for view in (view for pair in pairs(window, "drawing", 25, size=224) for view in pair):
            row = to_color(view, "gray")[112].astype(int)
            is_ink = np.abs(row - np.median(row)) > 45
            marks = np.flatnonzero(is_ink[1:] & ~is_ink[:-1])
            gaps = np.diff(marks)
            assert len(gaps) and 25 < np.median(gaps) < 100  # 60 px of the sheet, halved at most


def test_what_a_view_shows_is_a_number_of_pixels_of_the_sheet_however_large_it_is_drawn():
    window = lines(800, spacing=40)
    for size, extent in ((96, 200), (224, 200), (224, 600)):
        for view in (
            view for pair in pairs(window, "drawing", 12, size=size, extent=extent) for view in pair
        ):
            row = to_color(view, "gray")[size // 2].astype(int)
            is_ink = np.abs(row - np.median(row)) > 40
            marks = (is_ink[1:] & ~is_ink[:-1]).sum()  # a crop has .5 to 1 of the extent, a line each 40 px
            assert extent * 0.45 / 40 - 1 <= marks <= extent / 40 + 1


def test_a_view_shows_by_default_what_leaves_lines_a_pixel_wide():
    assert [recipes.default_extent(size, None) for size in (96, 224)] == [168, 392]  # as it always was
    assert [recipes.default_extent(96, line) for line in (0.0, 1.4, 2.9, 3.2, 6.0)] == [
        168,
        168,
        168,
        252,
        504,
    ]
    window = lines(512)
    for one, other in zip(pairs(window, "drawing", 3), pairs(window, "drawing", 3, extent=112), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(600, 600), (600, 600, 3)])
def test_views_of_shaded_paper_look_at_the_symbol_and_not_at_the_shadow(shape):
    window = np.full((600, 600), 240.0)
    cv2.circle(window, (480, 120), 24, 40, 3)  # the only symbol, in the light
    window *= np.where(np.arange(600) < 380, 0.5, 1)[None]  # and a shadow over most of the paper
    window[:, 370:390] = np.linspace(120, 240, 20)
    window = window.astype(np.uint8) if len(shape) == 2 else np.dstack([window] * 3).astype(np.uint8)

    def share(tolerance):
        """Of the views, how many show the symbol: it differs from its paper by more than the shadow does."""
        seen = [
            np.ptp(to_color(view, "gray").astype(int)) > 135
            for pair in pairs(window, "drawing", 40, size=96, tolerance=tolerance)
            for view in pair
        ]
        return np.mean(seen)

    assert share(60) > 0.7 > 0.4 > share(None)


def test_both_views_of_a_pair_look_at_one_region():
    window = np.full((2000, 2000), 255, np.uint8)
    for k, (x, y) in enumerate([(200, 200), (1700, 300), (300, 1700), (1600, 1600)]):
        cv2.circle(window, (x, y), 20 + 10 * k, 60 * k, -1)  # four islands of ink, each of its own shade
    for first, second in pairs(window, "drawing", 30, size=96):
        assert contrast(first) > 20 and contrast(second) > 20
    assert recipes.SHARE[0] * np.exp(-recipes.RATIO) > 0.5  # so any two crops overlap


def test_drawing_leaves_orientation_alone_unless_asked():
    window = np.full((512, 512), 255, np.uint8)
    for offset in range(-512, 512, 64):
        cv2.line(window, (offset, 0), (offset + 512, 512), 0, 4, cv2.LINE_AA)

    def handedness(view):
        gray = to_color(view, "gray")
        return np.sign((cv2.Sobel(gray, cv2.CV_32F, 1, 0) * cv2.Sobel(gray, cv2.CV_32F, 0, 1)).sum())

    asis = [handedness(view) for pair in pairs(window, "drawing", 40) for view in pair]
    turned = [handedness(view) for pair in pairs(window, "drawing", 40, orientation=True) for view in pair]
    assert len(set(asis)) == 1
    assert 0.3 < np.mean(np.array(turned) == asis[0]) < 0.7


def test_color_that_carries_meaning_stays_in_drawing():
    window = np.full((512, 512, 3), (20, 25, 30), np.uint8)
    for y in range(100, 400, 40):
        window[y : y + 2, 60:460] = (220, 40, 40)
    for view in (view for pair in pairs(window, "drawing", 60, size=128) for view in pair):
        hue = cv2.cvtColor(view, cv2.COLOR_RGB2HSV)[..., 0].astype(int)
        chroma = np.ptp(view, axis=2)
        strong = chroma > 0.6 * chroma.max()
        away = np.minimum(hue[strong], 180 - hue[strong])  # in steps of 2 degrees, red is 0
        assert np.median(away) < 12


@pytest.mark.parametrize("shape", [(64, 64), (224, 224, 3), (600, 600)])
def test_scan_noise_is_normal_and_equal_in_all_channels(shape):
    image, drawn = np.full(shape, 120, np.uint8), draw(Use.VIEWS, 0)
    for sigma in (2.0, 10.0):
        noise = recipes.scan_noise(image, sigma, drawn).astype(float).reshape(shape[0] * shape[1], -1) - 120
        assert (noise == noise[:, :1]).all()
        assert abs(noise.mean()) < 0.1 * sigma and noise.std() == pytest.approx(sigma, rel=0.08)
        again = recipes.scan_noise(image, sigma, drawn).reshape(len(noise), -1)
        assert abs(np.corrcoef(again[:, 0], noise[:, 0])[0, 1]) < 0.1


def test_paper_of_the_sheet_holds_where_a_window_has_more_of_another_color():
    window = np.full((400, 400), 20, np.uint8)
    window[:, :60] = 255  # a dark panel on white paper
    at = [recipes._around_ink(window, 255, 40, 100, 100, draw(Use.VIEWS, 0, 0, i)) for i in range(30)]
    assert np.mean([window[y + 50, x + 50] for x, y in at]) < 40
    given = two_views(window, "drawing", 64, 0, 0, 3, paper=20)
    np.testing.assert_array_equal(given, two_views(window, "drawing", 64, 0, 0, 3))
    assert not np.array_equal(given, two_views(window, "drawing", 64, 0, 0, 3, paper=255))


def test_inverting_keeps_the_hue_and_undoes_itself():
    inverted = pixels.invert(PHOTO_RGB)
    np.testing.assert_array_equal(pixels.invert(inverted), PHOTO_RGB)
    before, after = (
        cv2.cvtColor(np.float32(i) / 255, cv2.COLOR_RGB2HSV)[..., 0] for i in (PHOTO_RGB, inverted)
    )
    colorful = np.ptp(PHOTO_RGB, axis=2) > 8
    assert np.abs((before - after + 180) % 360 - 180)[colorful].max() < 1


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("shape", [(512, 512), (512, 512, 3), (40, 40), (300, 90, 3)])
def test_any_window_gives_two_rgb_views(recipe, shape):
    for window in (np.full(shape, 255, np.uint8), np.random.default_rng(0).integers(0, 256, shape, np.uint8)):
        before = window.copy()
        for view in (view for pair in pairs(window, recipe, 8, size=96) for view in pair):
            assert view.shape == (96, 96, 3) and view.dtype == np.uint8 and view.flags.c_contiguous
        np.testing.assert_array_equal(window, before)


def test_unknown_recipes_and_parts_are_refused_by_name():
    with pytest.raises(ValueError, match="'photo' is none of drawing, simclr, vicreg"):
        two_views(SHEET, "photo", 64, 0, 0, 0)
    with pytest.raises(
        ValueError, match="--without solarize: the recipe simclr has crop, mirror, jitter, gray, "
    ):
        two_views(SHEET, "simclr", 64, 0, 0, 0, without=("blur", "solarize"))


@pytest.mark.parametrize("shared", [False, True])
def test_command_draws_the_very_views_of_a_run(tmp_path, shared):
    (tmp_path / "sheets").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "sheets/a.png").write_bytes(cv2.imencode(".png", SHEET)[1].tobytes())
    if shared:
        store = build_store(tmp_path / "sheets", tmp_path, side=128, shared=True)
        (tmp_path / "run/store.txt").write_text(str(store.folder))
    else:
        store = build_store(tmp_path / "sheets", tmp_path / "run/windows", side=128)
    settings = {"image_size": 48, "view": 100, "seed": 5, "strength": 0.5, "orientation": True}
    config = {"data_dir": str(tmp_path / "sheets"), "recipe": "drawing", **settings}
    without = () if shared else ("crop", "noise")  # earlier versions had no such flag
    config |= {"without": without} if without else {}
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    out = tmp_path / "views.png"
    command = [sys.executable, "-m", "schematics.views", "--exp-dir", str(tmp_path / "run"), str(out)]
    done = subprocess.run([*command, "--most", "2"], check=True, capture_output=True, text=True)
    assert "at most 100 px of the sheet, drawn at 48 px" in done.stdout
    picture, last = cv2.imread(str(out))[..., ::-1], len(store) - 1
    assert picture.shape == (2 * 50, 48 * 9, 3)
    paper = store.paper(last)
    options = {"extent": 100, "paper": paper, "without": without}
    views = two_views(store.window(last), "drawing", 48, 5, 3, last, 0.5, True, **options)
    np.testing.assert_array_equal(picture[50:98, -96:], np.hstack(views))
    (tmp_path / "run/config.json").unlink()
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and "no config.json" in failed.stderr and failed.stderr.count("\n") == 1


def test_command_draws_a_picture_of_the_recipes(tmp_path):
    (tmp_path / "a.png").write_bytes(cv2.imencode(".png", SHEET)[1].tobytes())
    out = tmp_path / "views.png"
    command = [sys.executable, "-m", "schematics.views", str(tmp_path / "a.png"), str(out), "--size", "64"]
    subprocess.run(command, check=True, capture_output=True)
    assert cv2.imread(str(out)).shape == (3 * (64 + 2), 64 * 9, 3)
    failed = subprocess.run([*command, "--without", "invert"], capture_output=True, text=True)
    assert (
        failed.stderr == "error: --without invert: the recipe simclr has crop, mirror, jitter, gray, blur\n"
    )
    blank = cv2.imencode(".png", np.full((300, 300), 255, np.uint8))[1].tobytes()
    (tmp_path / "a.png").write_bytes(blank)
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
