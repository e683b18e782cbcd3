"""The report: one whole file, right figures in it, nothing loaded, nothing run that a class name brings; and
in a real browser it opens clean, filters, sorts, reads out and fits a phone."""

import base64
import json
import os
import re
import textwrap
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import Browser, find_chromium

from detection.metrics.analysis import analyse
from detection.metrics.coco import measure
from detection.metrics.coverage import cover
from detection.metrics.ranges import Basis, Ranges, tally_matches
from detection.metrics.tide import KINDS
from detection.report.gallery import LONGEST, choose_sheets, picture_uri
from detection.report.page import write_report
from schematics.coco import Category, read_split, to_coco, write_split
from schematics.sheets import DataError, read_sheet

EVIL = '<script>document.title="owned"</script>"\' onload="x'
LONG = "terminal_block_feed_through_with_fuse_and_indicator_led"
NAMES = ("resistor", EVIL, "capacitor", "never drawn", LONG)
GIVEN = "the detector's, of the highest F1 on its validation sheets"
SIZES = ((500, 400), (300, 640), (420, 420), (400, 400), (350, 300))


def drawn_split(folder, names=NAMES):
    """Five sheets, the last without symbols, the second on dark paper; a row of symbols of each class."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for n, (width, height) in enumerate(SIZES):
        sheet = np.full((height, width, 3), 30 if n == 1 else 255, np.uint8)
        images.append({"id": n + 1, "file_name": f"sheet_{n}.png", "width": width, "height": height})
        for label in range(3) if n < 4 else ():
            for place in range(2 + n):
                x, y = 20 + 52 * place, 30 + 90 * label
                cv2.rectangle(sheet, (x, y), (x + 30, y + 40), (128, 128, 128), 2)
                row = {"image_id": n + 1, "category_id": label + 1, "bbox": [x, y, 30, 40]}
                annotations.append(row)
        cv2.imwrite(str(folder / f"sheet_{n}.png"), sheet)
    write_split(folder, images, [Category(n + 1, name) for n, name in enumerate(names)], annotations)
    return read_split(folder)


def one_of_each(split):
    """The truth found on the fourth sheet; on the others all but the first symbol of a class, and on the
    first sheet each kind of error: (kind, class, box)."""
    made = [
        {**{key: row[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9}
        for row in to_coco(split)["annotations"]
        if row["image_id"] == 4 or row["bbox"][0] > 20
    ]
    wrong = (
        (2, [20, 30, 30, 40]),  # class: a resistor called by the evil name
        (2, [20, 150, 30, 40]),  # localisation
        (3, [72, 52, 30, 40]),  # both: half on a resistor
        (1, [73, 31, 30, 40]),  # duplicate
        (4, [420, 300, 30, 40]),  # background, of a class that is nowhere
    )
    return made + [
        {"image_id": 1, "category_id": number, "bbox": bbox, "score": 0.8} for number, bbox in wrong
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(report.html, its figures, its analysis, the split)"""
    folder = tmp_path_factory.mktemp("report")
    split = drawn_split(folder / "test")
    detections = one_of_each(split)
    figures, matches = measure(to_coco(split), detections)
    analysis = analyse(matches, thresholds=dict.fromkeys(range(1, 5), 0.5), resamples=50)
    settings = {"checkpoint": "runs/a&b/model.pt"}
    own, shared, none = Basis(0.5, 30), Basis(1.5, 12, pooled=True), Basis()
    bases = (own, shared, own, none, none)
    ranges = Ranges(NAMES, (0.5,) * 5, 1.0, (60, 9, 70, 0, 0), 40, bases, bases, Basis(2.0, 40))
    coverage = cover(ranges, tally_matches(matches, analysis.thresholds), matches.positives)
    page = write_report(
        folder / "report.html",
        split,
        figures,
        analysis,
        title=EVIL,
        settings=settings,
        thresholds_from=GIVEN,
        coverage=coverage,
        ranges_from="ranges of the counts, for sheets like the 40 labelled ones",
    )
    return page, figures, analysis, split


class Reader(HTMLParser):
    """Tags with attributes, and the text outside script and style."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._skipped = [], "", False
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._skipped = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._skipped = False

    def handle_data(self, data):
        self.text += "" if self._skipped else data


# Without a browser


def test_the_page_loads_nothing_from_elsewhere(made):
    for tag, attributes in Reader(made[0]).tags:
        for name in ("src", "href", "action", "poster", "srcset", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"<{tag} {name}={value}>"
    style = (Path(__file__).parent.parent / "detection" / "report" / "style.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_the_page_says_the_figures_and_the_settings(made):
    page, figures, analysis, _ = made
    text = " ".join(Reader(page).text.split())
    for name in ("AP", "AP50", "AP75"):
        bounds = analysis.intervals[name]
        assert f"{name} {figures.fitted[name]:.3f} {bounds.low:.3f} to {bounds.high:.3f}" in text
    assert "runs/a&b/model.pt" in text
    assert "5 sheets, 42 boxes of 3 classes" in text
    assert "50 resamples of the 5 sheets: with so few sheets they are rough" in text
    assert text.count(GIVEN) == 2
    assert "never drawn (1)" in text


def test_the_kind_class_and_the_confusions_do_not_contradict_each_other(made, tmp_path):
    """A symbol found twice, once under another name: an error of class, but no mistaken symbol."""
    _, _, _, split = made
    first = to_coco(split)["annotations"][0]
    row = {key: first[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
    twice = [row, {**row, "category_id": 3, "score": 0.8}]
    figures, matches = measure(to_coco(split), twice)
    analysis = analyse(matches, thresholds=dict.fromkeys(range(1, 6), 0.5), resamples=10)
    assert analysis.kinds.counts()["class"] == 1
    page = write_report(tmp_path / "r.html", split, figures, analysis, title="twice")
    text = " ".join(Reader(page).text.split())
    assert "No symbol was found by the name of another class alone." in text
    assert "1 detections are errors of the kind class; here 0 symbols are taken for another class." in text


def test_what_was_left_out_and_what_to_label_more_of(made, tmp_path):
    _, figures, analysis, split = made
    known = {number: 5 if number < 3 else 50 for number in analysis.matches.category_ids.tolist()}
    weak = min(range(2), key=lambda k: analysis.class_ap50[k].value)
    options = {"notes": ["test: 3 boxes <dropped>"], "in_train": known}
    text = Reader(write_report(tmp_path / "r.html", split, figures, analysis, title="t", **options)).text
    assert "test: 3 boxes <dropped>" in text and "in train" in text
    advice = text.partition("Label more of these")[2].partition("\n")[0]
    assert f"{NAMES[weak]} (5 boxes in train, AP50 {analysis.class_ap50[weak].value:.2f})" in advice
    assert "capacitor" not in advice


def test_the_page_says_what_ranges_of_counts_hold_and_which_sheets_to_look_at(made, tmp_path):
    text = " ".join(Reader(made[0]).text.split())
    assert "Ranges of the counts, for sheets like the 40 labelled ones." in text
    assert (
        "By class, on the sheets where it was found. A class on fewer than 19 labelled sheets shares" in text
    )
    section = text[
        text.index("By class, on the sheets where it was found") : text.index("The worst and the best")
    ]
    assert "30 sheets" in section and "12 sheets, shared" in section and "no labelled symbol" in section
    assert section.index("sheet_0.png") < section.index("sheet_4.png"), (
        "the one with doubtful finds comes first"
    )
    page, figures, analysis, split = made
    said = "no ranges of the counts: 8 labelled sheets can't promise 90 % for a count: that takes 9"
    page = write_report(tmp_path / "none.html", split, figures, analysis, title="", ranges_from=said)
    text = Reader(page).text
    assert "8 labelled sheets can't promise 90 %" in text and "widest first" not in text


def test_names_are_text(made):
    tags = Reader(made[0]).tags
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not [attributes for _, attributes in tags if "onload" in attributes]
    assert EVIL in Reader(made[0]).text


def test_each_detection_and_truth_of_the_gallery_is_a_box_of_its_kind(made):
    _, _, analysis, _ = made
    boxes = [attributes for tag, attributes in Reader(made[0]).tags if "data-partner" in attributes]
    found = [KINDS[int(box["data-kind"])] for box in boxes if "data-score" in box]
    counts = analysis.kinds.counts()
    assert {kind: found.count(kind) for kind in KINDS if kind != "missed"} == {
        kind: number for kind, number in counts.items() if kind != "missed"
    }
    assert all(counts[kind] == 1 for kind in ("class", "localisation", "both", "duplicate", "background"))
    truth = [KINDS[int(box["data-kind"])] for box in boxes if "data-score" not in box]
    assert truth.count("missed") == counts["missed"] == 7 and len(truth) == 42
    assert truth.count("class") == truth.count("localisation") == 1


def test_the_gallery_holds_the_worst_and_the_best_sheets(made):
    _, _, analysis, _ = made
    assert analysis.sheet_f1[:4].argmin() == 0 and analysis.sheet_f1[3] == 1
    assert choose_sheets(analysis, 2) == [(0, "worst"), (3, "best")]
    assert choose_sheets(analysis, 12) == [(0, "worst"), (1, "worst"), (3, "best"), (2, "best")]
    assert choose_sheets(analysis, 1) == [(0, "worst")]  # the fifth, empty and left so, is not shown
    assert choose_sheets(analysis, 0) == []


def test_pictures_are_bounded(tmp_path):
    large = picture_uri(np.full((900, 4000), 255, np.uint8))
    assert large.startswith("data:image/webp;base64,")
    (tmp_path / "large.webp").write_bytes(base64.b64decode(large.partition(",")[2]))
    assert read_sheet(tmp_path / "large.webp").shape == (round(900 * LONGEST / 4000), LONGEST)


def test_a_report_that_fails_leaves_the_old_one(made, tmp_path):
    _, figures, analysis, split = made
    page = tmp_path / "report.html"
    page.write_text("the old one")
    (split.folder / "sheet_0.png").rename(split.folder / "away.png")
    try:
        with pytest.raises(DataError, match=r"sheet_0\.png"):
            write_report(page, split, figures, analysis, title="new")
    finally:
        (split.folder / "away.png").rename(split.folder / "sheet_0.png")
    assert page.read_text() == "the old one" and len(list(tmp_path.iterdir())) == 1


def test_the_example_in_the_docs_runs_as_written(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "report.md").read_text().partition("## In Python")[2]
    lines = [line for line in text.splitlines() if line.startswith("    ") or not line]
    for name in ("valid", "test"):
        split = drawn_split(tmp_path / "DATA" / name)
        (tmp_path / "OUT" / f"evaluate-{name}").mkdir(parents=True)
        results = json.dumps(one_of_each(split))
        (tmp_path / "OUT" / f"evaluate-{name}" / "predictions.json").write_text(results)
    monkeypatch.chdir(tmp_path)
    exec(textwrap.dedent("\n".join(lines)), {})
    assert "5 sheets, 42 boxes of 3 classes" in Reader(tmp_path / "report.html").text


def test_a_report_on_nothing_found(tmp_path):
    split = drawn_split(tmp_path / "test")
    figures, matches = measure(to_coco(split), [])
    analysis = analyse(matches, resamples=10)
    text = Reader(write_report(tmp_path / "r.html", split, figures, analysis, title="empty")).text
    assert text.count("of the highest F1 on these very sheets, so F1 and counts are flattered") == 2


# In Chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not find_chromium():
        reason = "no chromium here: apt-get install -y chromium"
        if os.environ.get("CI") or os.environ.get("LINEWORK_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def page(browser, made):
    browser.open(made[0])
    yield browser
    assert browser.problems == []


def visible(browser, selector=".view .box"):
    """How many boxes can be seen: not one that is hidden, nor on a hidden sheet."""
    return browser.run(
        f"[...document.querySelectorAll({selector!r})].filter(e => e.getClientRects().length).length"
    )


def test_it_opens_without_errors_or_requests(page, made):
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith("data:")] == [made[0].resolve().as_uri()]
    assert page.run("[...document.images, ...document.querySelectorAll('image')].length") == 4
    assert page.run("document.title") == EVIL  # the name itself, not what the script in it would set
    assert visible(page) == 42 + 38
    assert page.run("document.querySelector('#status').textContent") == "80 of 80 boxes on 4 sheets"


@pytest.mark.parametrize("kind", range(7))
def test_unticking_a_kind_hides_its_boxes_and_no_others(page, kind):
    of_kind = visible(page, f'.view .box[data-kind="{kind}"]')
    assert of_kind > 0
    page.click(f"input[name=kind][value='{kind}']")
    assert visible(page, f'.view .box[data-kind="{kind}"]') == 0
    assert visible(page) == 80 - of_kind
    page.click(f"input[name=kind][value='{kind}']")
    assert visible(page) == 80


def test_a_kind_s_button_shows_it_alone_and_reset_shows_all(page):
    page.click("[data-show='6']")
    assert visible(page) == visible(page, '.view .box[data-kind="6"]') == 7
    assert page.run("[...document.querySelectorAll('.sheet')].filter(e => !e.hidden).length") == 3
    page.click("#reset")
    assert visible(page) == 80
    page.click("#only-errors")
    assert visible(page, '.view .box[data-kind="0"]') == 0
    assert visible(page) == 7 + 2 + 5


def test_class_and_group_filter_together(page):
    def choose(control, value):
        page.run(
            f"(() => {{ const e = document.querySelector('{control}'); e.value = '{value}'; "
            "e.dispatchEvent(new Event('change')); })()"
        )

    choose("#class", 1)
    assert visible(page) == visible(page, '.view .box[data-class="1"]') > 0
    assert page.run("document.querySelectorAll('polyline.lit[data-class=\"1\"]').length") == 2
    choose("#group", "best")
    assert visible(page, '.sheet[data-group="worst"] .box') == 0
    assert visible(page) > 0
    choose("#class", 3)  # only a background error on a worst sheet
    assert visible(page) == 0
    assert page.run("!document.querySelector('#nothing').hidden")


def test_a_class_s_name_in_the_table_picks_it(page):
    page.click("#classes [data-pick='2']")
    assert page.run("document.querySelector('#class').value") == "2"
    assert visible(page) == visible(page, '.view .box[data-class="2"]') > 0
    page.click("#classes [data-pick='2']")
    assert visible(page) == 80


def test_a_table_sorts_both_ways(page):
    def column(n):
        rows = "[...document.querySelectorAll('#classes .sortable tbody tr')]"
        return page.run(f"{rows}.map(row => row.cells[{n}].textContent)")

    page.click("#classes .sortable thead th:nth-child(8) button")
    values = [float(text) for text in column(7)]
    assert values == sorted(values, reverse=True) and len(set(values)) > 1
    page.click("#classes .sortable thead th:nth-child(8) button")
    assert [float(text) for text in column(7)] == sorted(values)
    page.click("#classes .sortable thead th:nth-child(1) button")
    assert [name.strip() for name in column(0)] == [EVIL, "capacitor", "resistor"]


def test_pointing_at_a_box_reads_it_and_lights_its_partner(page):
    where = page.run(
        """(() => { const e = document.querySelector('.box[data-score][data-kind="1"]');
        e.scrollIntoView({block: 'center', behavior: 'instant'});
        return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {
          const r = e.getBoundingClientRect(); done([r.x + r.width / 2, r.y + r.height / 2]); }))); })()"""
    )
    page.move(*where)
    assert (
        page.run("document.querySelector('#tip').textContent") == f"{EVIL} · 0.80 · class · truth: resistor"
    )
    assert page.run("!document.querySelector('#tip').hidden")
    assert page.run("document.querySelectorAll('.box.lit').length") == 2


def test_pointing_at_a_chart_reads_the_curve(page):
    where = page.run(
        """(() => { const e = document.querySelector('.chart svg');
        e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect();
        return [r.x + r.width * (46 + 380 * 0.3) / 440, r.y + r.height * 15 / 320]; })()"""
    )
    page.move(*where)
    reading = page.run("document.querySelector('.chart .reading').textContent")
    assert re.fullmatch(r".+: precision \d\.\d\d at recall 0\.30", reading), reading
    assert page.run("document.querySelectorAll('.chart polyline.lit').length") == 1


def test_a_sheet_enlarges_within_its_own_frame(page):
    width = "document.querySelector('.sheet .view svg').getBoundingClientRect().width"
    before = page.run(width)
    page.click(".sheet .enlarge")
    assert page.run(width) == 1400 > before
    assert page.run("document.documentElement.scrollWidth <= innerWidth")
    page.click(".sheet .enlarge")
    assert page.run(width) == before


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_light_and_dark(browser, made, dark, tmp_path):
    browser.open(made[0], width=390, height=844, dark=dark)
    assert browser.run("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    wider = browser.run(
        "[...document.querySelectorAll('main > section > *, .sheet > *')]"
        ".filter(e => e.getBoundingClientRect().right > 390.5).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wider == []
    shot = read_sheet(browser.screenshot(tmp_path / "phone.png", whole=True))
    assert shot.shape[1] == 390
    assert (np.median(shot) < 60) == dark
    assert shot.std() > 15  # not a blank page
    assert browser.problems == []


def test_the_theme_button_overrides_the_system(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.run(ground)
    page.click("#theme")
    assert page.run(ground) != light
    page.click("#theme")
    assert page.run(ground) == light


def test_text_has_contrast(browser, made):
    """WCAG's 4.5 to 1 for body and soft text on page and card, in both themes."""
    for dark in (False, True):
        browser.open(made[0], dark=dark)
        colors = browser.run(
            "['--ink', '--soft', '--page', '--card']"
            ".map(n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
        )
        ink, soft, page, card = map(luminance, colors)
        for text in (ink, soft):
            for ground in (page, card):
                assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5


def luminance(color):
    digits = color.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    rgb = np.array([int(digits[n : n + 2], 16) / 255 for n in (0, 2, 4)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
