"""Every kind of drawing is read as it looks; a file cut short is an error, whatever its format."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from schematics import sheets
from schematics.containers import looks_truncated
from schematics.sheets import DataError, Sheet, find_sheets, read_sheet, sheet_size, to_color

# pytest lifts the filters that schematics.sheets sets.
pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning"
)
EXACT = [
    ("png", {}),
    ("tif", {}),
    ("tif", {"compression": "tiff_lzw"}),
    ("bmp", {}),
    ("webp", {"lossless": True}),
]


def drawing(height: int = 60, width: int = 90) -> np.ndarray:
    """White paper, a red frame, a black wire, a blue corner: no symmetry, so that no turn goes unseen."""
    image = np.full((height, width, 3), 255, np.uint8)
    cv2.rectangle(image, (5, 5), (width - 20, height - 12), (200, 30, 10), 2)
    cv2.line(image, (10, height // 2), (width - 1, height - 5), (0, 0, 0), 3)
    image[:12, :20] = (20, 40, 160)
    return image


def encoded(image: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(kind, kind.upper()), **options)
    return buffer.getvalue()


def tiff_by_hand(data: bytes, width: int, height: int, bits: int, white_is_zero: bool) -> bytes:
    """A little-endian gray TIFF of one strip: what Pillow reads and does not write."""
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1)]
    tags += [(273, 8), (277, 1), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return (
        b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)
    )


@pytest.mark.parametrize(("kind", "options"), EXACT)
def test_color_and_gray_come_back_exactly(tmp_path, kind, options):
    color, gray = drawing(), drawing()[..., 0]
    (tmp_path / f"color.{kind}").write_bytes(encoded(color, kind, **options))
    (tmp_path / f"gray.{kind}").write_bytes(encoded(gray, kind, **options))
    np.testing.assert_array_equal(read_sheet(tmp_path / f"color.{kind}"), color)
    np.testing.assert_array_equal(read_sheet(tmp_path / f"gray.{kind}"), gray)
    assert sheet_size(tmp_path / f"color.{kind}") == (90, 60)


@pytest.mark.parametrize("options", [{"quality": 95}, {"quality": 95, "progressive": True}])
def test_jpeg_color_gray_and_cmyk(tmp_path, options):
    color = cv2.GaussianBlur(drawing(), (9, 9), 0)
    (tmp_path / "color.jpg").write_bytes(encoded(color, "jpg", subsampling=0, **options))
    (tmp_path / "gray.jpg").write_bytes(encoded(color[..., 0], "jpg", **options))
    Image.fromarray(color).convert("CMYK").save(tmp_path / "cmyk.jpg", **options)
    for name in ("color.jpg", "cmyk.jpg"):
        assert np.abs(read_sheet(tmp_path / name).astype(int) - color).max() < 25, name
    gray = read_sheet(tmp_path / "gray.jpg")
    assert gray.ndim == 2 and np.abs(gray.astype(int) - color[..., 0]).max() < 25


@pytest.mark.parametrize("installed", [True, False])
def test_a_png_is_the_same_to_the_last_bit_with_kornia_rs_or_without(tmp_path, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "kornia_rs", None)  # what an absent package looks like to import
        monkeypatch.setitem(sys.modules, "kornia_rs.io", None)
    sheets._png_decoder.cache_clear()
    noise = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    filters = (cv2.IMWRITE_PNG_FILTER_NONE, cv2.IMWRITE_PNG_FILTER_SUB, cv2.IMWRITE_PNG_FILTER_UP)
    filters += (cv2.IMWRITE_PNG_FILTER_AVG, cv2.IMWRITE_PNG_FILTER_PAETH, cv2.IMWRITE_PNG_ALL_FILTERS)
    for image in (noise, noise[..., 0], noise[:1, :1], drawing(), drawing(301, 7)):
        for rows in filters:
            data = cv2.imencode(".png", image[..., ::-1], [cv2.IMWRITE_PNG_FILTER, rows])[1].tobytes()
            (tmp_path / "a.png").write_bytes(data)
            assert np.array_equal(read_sheet(tmp_path / "a.png"), np.asarray(Image.open(io.BytesIO(data))))
    # The chunks are as their checksums say, but there is no such filter as that of the first row.
    rows = [b"\x09", *(bytes([0, *row.tobytes()]) for row in noise)]
    packed, size = zlib.compress(b"".join(rows)), struct.pack(">IIBBBBB", 90, 70, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", size), (b"IDAT", packed), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded"):
        read_sheet(tmp_path / "a.png")
    sheets._png_decoder.cache_clear()


def test_three_equal_channels_are_gray(tmp_path):
    gray = drawing()[..., 1]
    (tmp_path / "a.png").write_bytes(encoded(np.dstack([gray] * 3), "png"))
    np.testing.assert_array_equal(read_sheet(tmp_path / "a.png"), gray)
    almost = np.dstack([gray] * 3)
    almost[-1, -1, 2] ^= 1
    (tmp_path / "b.png").write_bytes(encoded(almost, "png"))
    np.testing.assert_array_equal(read_sheet(tmp_path / "b.png"), almost)


@pytest.mark.parametrize("kind", ["png", "tif"])
def test_16_bits_are_scaled_not_cut(tmp_path, kind):
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    (tmp_path / f"a.{kind}").write_bytes(encoded(ramp, kind))
    np.testing.assert_array_equal(read_sheet(tmp_path / f"a.{kind}"), np.arange(256).reshape(16, 16))


def test_16_bit_color_and_transparency(tmp_path):
    color = drawing().astype(np.uint16) * 257
    cv2.imwrite(str(tmp_path / "rgb.png"), color[..., ::-1])
    cv2.imwrite(str(tmp_path / "rgb.tif"), color[..., ::-1])
    cv2.imwrite(
        str(tmp_path / "rgba.png"), np.dstack([color[..., ::-1], np.full((60, 90), 65535, np.uint16)])
    )
    for name in ("rgb.png", "rgb.tif", "rgba.png"):
        np.testing.assert_array_equal(read_sheet(tmp_path / name), drawing(), err_msg=name)


@pytest.mark.parametrize("white_is_zero", [False, True])
def test_tiff_of_12_and_16_bits_by_its_own_white(tmp_path, white_is_zero):
    levels = [0, 1, 2, 3]  # thirds of full scale
    twelve = [level * 1365 for level in levels]
    packed = b"".join(
        struct.pack(">I", (a << 12 | b) << 8)[:3] for a, b in zip(*[iter(twelve)] * 2, strict=True)
    )
    (tmp_path / "12.tif").write_bytes(tiff_by_hand(packed, 4, 1, 12, white_is_zero=False))
    sixteen = struct.pack("<4H", *(level * 21845 for level in levels))
    (tmp_path / "16.tif").write_bytes(tiff_by_hand(sixteen, 4, 1, 16, white_is_zero))
    want = [[255, 170, 85, 0]] if white_is_zero else [[0, 85, 170, 255]]
    assert read_sheet(tmp_path / "12.tif").tolist() == [[0, 85, 170, 255]]
    assert read_sheet(tmp_path / "16.tif").tolist() == want


@pytest.mark.parametrize(
    ("kind", "options"), [("png", {}), ("bmp", {}), ("tif", {}), ("tif", {"compression": "group4"})]
)
def test_1_bit_is_black_and_white(tmp_path, kind, options):
    black = drawing()[..., 1] < 128
    (tmp_path / f"a.{kind}").write_bytes(encoded(~black, kind, **options))
    np.testing.assert_array_equal(read_sheet(tmp_path / f"a.{kind}"), np.where(black, 0, 255))


def test_palette_with_and_without_transparency(tmp_path):
    indices = np.array([[0, 1, 2]], np.uint8)
    picture = Image.fromarray(indices, "P")
    picture.putpalette([255, 0, 0, 0, 0, 255, 9, 9, 9])
    picture.save(tmp_path / "plain.png")
    picture.save(tmp_path / "clear.png", transparency=2)
    assert read_sheet(tmp_path / "plain.png").tolist() == [[[255, 0, 0], [0, 0, 255], [9, 9, 9]]]
    assert read_sheet(tmp_path / "clear.png").tolist() == [[[255, 0, 0], [0, 0, 255], [255, 255, 255]]]


@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_alpha_is_laid_over_white(tmp_path, kind):
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 200, 128]]], np.uint8)
    options = {"lossless": True, "exact": True} if kind == "webp" else {}
    (tmp_path / f"a.{kind}").write_bytes(encoded(rgba, kind, **options))
    assert read_sheet(tmp_path / f"a.{kind}").tolist() == [[[10, 20, 30], [255, 255, 255], [127, 177, 227]]]


def test_gray_with_alpha_and_gray_with_a_clear_level(tmp_path):
    Image.merge("LA", [Image.new("L", (2, 1), 40), Image.new("L", (2, 1), 0)]).save(tmp_path / "la.png")
    assert read_sheet(tmp_path / "la.png").tolist() == [[255, 255]]
    Image.fromarray(np.array([[0, 7]], np.uint8)).save(tmp_path / "l.png", transparency=7)
    assert read_sheet(tmp_path / "l.png").tolist() == [[0, 255]]


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path, kind, orientation):
    picture = Image.fromarray(drawing())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    picture.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    picture.getexif()[0x0112] = orientation
    want = np.array(ImageOps.exif_transpose(picture))
    got = read_sheet(path)
    assert got.shape == want.shape and sheet_size(path) == (want.shape[1], want.shape[0])
    assert np.abs(got.astype(int) - want).mean() < 6  # the JPEG's own loss; a wrong turn gives over 30


def test_pages_of_a_tiff_without_its_thumbnail(tmp_path):
    pages = [np.full((30, 40), level, np.uint8) for level in (0, 90, 180)]
    frames = [Image.fromarray(page) for page in pages]
    frames[1].encoderinfo = {"tiffinfo": {254: 1}}
    frames[0].save(tmp_path / "set.tif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "set.tif") as picture:
        picture.seek(1)
        assert picture.tag_v2.get(254) == 1
    sheets = find_sheets(tmp_path)
    assert [sheet.name for sheet in sheets] == [
        f"{tmp_path.as_posix()}/set.tif#page={page}" for page in (1, 3)
    ]
    assert [int(read_sheet(sheet)[0, 0]) for sheet in sheets] == [0, 180]


def test_a_tiff_cut_between_its_pages_loses_none_in_silence(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (3, 60, 80), dtype=np.uint8)
    frames = [Image.fromarray(page) for page in noise]
    frames[0].save(tmp_path / "set.tif", save_all=True, append_images=frames[1:])
    whole = (tmp_path / "set.tif").read_bytes()
    for share in (0.5, 0.9):
        (tmp_path / "set.tif").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(DataError, match=r"set\.tif"):
            [read_sheet(sheet) for sheet in find_sheets(tmp_path)]


def test_pages_of_a_pdf_at_the_resolution_asked_for(tmp_path):
    pages = [Image.new("RGB", (144, 72), "red"), Image.new("L", (72, 144), 0)]
    pages[0].save(tmp_path / "plan.pdf", save_all=True, append_images=pages[1:], resolution=72)
    sheets = find_sheets(tmp_path / "plan.pdf")
    assert [sheet.page for sheet in sheets] == [1, 2]
    for dpi in (72, 150):
        red, black = (read_sheet(sheet, dpi=dpi) for sheet in sheets)
        assert red.shape == (dpi, 2 * dpi, 3) and black.shape == (2 * dpi, dpi)
        assert red[dpi // 2, dpi].tolist()[1:] == [0, 0] and red[dpi // 2, dpi, 0] > 250
        assert black[dpi, dpi // 2] == 0
        assert sheet_size(sheets[0], dpi) == (2 * dpi, dpi)
    with pytest.raises(DataError, match="smaller --dpi"):
        read_sheet(sheets[0], dpi=20_000)
    with pytest.raises(DataError, match="has 2 pages, not 3"):
        read_sheet(Sheet(tmp_path / "plan.pdf", 3))


def cuts(size: int) -> list[int]:
    """Lengths to cut a file to: every few per cent, and each of its last bytes."""
    return sorted({size * percent // 100 for percent in range(0, 100, 7)} | {size - n for n in range(1, 24)})


TRUNCATED = [*EXACT, ("jpg", {}), ("jpg", {"progressive": True}), ("webp", {})]
TRUNCATED += [("tif", {"compression": "group4"}), ("tif", {"compression": "jpeg"}), ("pdf", {})]


@pytest.mark.parametrize(("kind", "options"), TRUNCATED)
def test_a_truncated_file_is_an_error_at_any_length(tmp_path, kind, options):
    image = drawing(200, 300)
    image[::3] = np.random.default_rng(0).integers(0, 256, (67, 300, 3))
    if options.get("compression") == "group4":
        image = image[..., 0] > 128
    data = encoded(image, kind, **options)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data)
    whole = read_sheet(path)
    assert not looks_truncated(path)
    for length in cuts(len(data)):
        path.write_bytes(data[:length])
        try:
            got = read_sheet(path)
        except DataError as error:
            assert "a." + kind in str(error) and "\n" not in str(error)
        else:  # a few bytes behind the last pixel: nothing that can be seen is gone
            assert kind in ("tif", "pdf") and len(data) - length < 24
            np.testing.assert_array_equal(got, whole)
        if kind in ("jpg", "png", "webp"):
            assert looks_truncated(path), length


@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_download_that_stopped_and_was_filled_with_zeros_is_an_error(tmp_path, kind):
    data = encoded(drawing(), kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    with pytest.raises(DataError, match="truncated"):
        read_sheet(path)
    assert looks_truncated(path)


def test_a_jpeg_cut_after_its_thumbnail_is_an_error_and_bytes_after_the_end_are_not(tmp_path):
    thumbnail = encoded(drawing(24, 36), "jpg")
    data = encoded(drawing(), "jpg")
    segment = b"\xff\xe1" + struct.pack(">H", len(thumbnail) + 8) + b"Exif\0\0" + thumbnail
    with_thumbnail = data[:2] + segment + data[2:]
    path = tmp_path / "a.jpg"
    path.write_bytes(with_thumbnail)
    whole = read_sheet(path)
    path.write_bytes(with_thumbnail[:-30])
    with pytest.raises(DataError, match="truncated"):
        read_sheet(path)
    path.write_bytes(with_thumbnail + b"trailing bytes of a phone")
    np.testing.assert_array_equal(read_sheet(path), whole)
    assert not looks_truncated(path)


def test_a_flipped_bit_in_a_png_is_an_error(tmp_path):
    data = bytearray(encoded(drawing(), "png"))
    data[len(data) // 2] ^= 16
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError):
        read_sheet(tmp_path / "a.png")


@pytest.mark.parametrize(
    "content", [b"", b"hello", encoded(drawing(), "gif"), b"%PDF-1.4\n%%EOF", b"\xff\xd8\xff"]
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp", ".webp", ".pdf"])
def test_what_is_no_drawing_is_one_line_that_names_it(tmp_path, content, suffix):
    path = tmp_path / f"plan{suffix}"
    path.write_bytes(content)
    assert find_sheets(tmp_path) == [Sheet(path)]  # it is a sheet: leaving it out silently would hide it
    with pytest.raises(DataError, match=f"plan{suffix}") as caught:
        read_sheet(path)
    assert "\n" not in str(caught.value)


def test_large_sheets(tmp_path):
    for width, height in ((20_000, 500), (500, 20_000)):
        path = tmp_path / f"{width}.png"
        Image.new("1", (width, height), 1).save(path)
        assert sheet_size(path) == (width, height)
        assert read_sheet(path).shape == (height, width)
    header = (tmp_path / "500.png").read_bytes()
    for side, fits in ((20_000, True), (20_001, False)):
        body = b"IHDR" + struct.pack(">II", side, side) + header[24:29]
        path = tmp_path / "square.png"
        path.write_bytes(header[:12] + body + struct.pack(">I", zlib.crc32(body)) + header[33:])
        if fits:
            assert sheet_size(path) == (side, side)
        else:
            with pytest.raises(DataError, match="400 megapixels"):
                sheet_size(path)


def test_finding_sheets_in_files_folders_and_trees(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "sub/deep/c.webp",
        "train/d.bmp",
        ".hidden.png",
        ".git/e.png",
        "__MACOSX/f.png",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "train/_annotations.coco.json").touch()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    found = [sheet.path.relative_to(tmp_path).as_posix() for sheet in find_sheets(tmp_path)]
    assert found == ["a.jpg", "b.PNG", "sub/deep/c.webp", "train/d.bmp"]
    assert find_sheets(tmp_path / "a.jpg") == [Sheet(tmp_path / "a.jpg")]
    for nothing in (tmp_path / "notes.txt", tmp_path / "absent"):
        with pytest.raises(DataError, match=nothing.name):
            find_sheets(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no drawings found"):
        find_sheets(tmp_path / "empty")


def test_color_modes():
    color = drawing()
    assert to_color(color, "rgb") is color and to_color(color, "gray").shape == (60, 90)
    gray = color[..., 0]
    assert to_color(gray, "gray") is gray
    np.testing.assert_array_equal(to_color(gray, "rgb"), np.dstack([gray] * 3))
    with pytest.raises(ValueError, match="rgb"):
        to_color(gray, "bgr")


def test_reading_drawings_needs_no_torch():
    modules = "sheets coco repair check convert symbols command"
    code = f"import sys, importlib; [importlib.import_module('schematics.' + m) for m in {modules.split()}]"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0
