"""Whatever bytes a drawing has, reading it ends soon, in bounded memory, as a picture or as one line."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from schematics import pdf
from schematics.containers import MAX_PAGES
from schematics.sheets import MAX_SCANS, DataError, find_sheets, read_sheet, sheet_size

CASES = Path(__file__).parent / "cases"
BLUE = b"0 0 1 rg 10 10 50 50 re f"


def document(*objects: bytes) -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    out, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj" % number + content + b"endobj\n"
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(out))
    return out + b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + table + trailer


def stream(about: bytes, content: bytes) -> bytes:
    return b"<<%s/Length %d>>stream\n%s\nendstream" % (about, len(content), content)


def pages(*about: bytes, content: bytes = BLUE, more: tuple[bytes, ...] = ()) -> bytes:
    """A PDF with a page of 100 x 200 points for each of `about`, which goes into the page's dictionary."""
    kids = b" ".join(b"%d 0 R" % (4 + n) for n in range(len(about)))
    return document(
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[%s]/Count %d>>" % (kids, len(about)),
        stream(b"", content),
        *(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 100 200]/Contents 3 0 R%s>>" % text for text in about),
        *more,
    )


def bomb(depth: int) -> bytes:
    """A page of 7 KB that draws a rectangle 20 ** depth times."""
    form = b"/Type/XObject/Subtype/Form/BBox[0 0 100 100]"
    nested = [
        stream(form + b"/Resources<</XObject<</X %d 0 R>>>>" % (6 + n), b"/X Do " * 20) for n in range(depth)
    ]
    first = b"/Resources<</XObject<</X 5 0 R>>>>"
    return pages(first, content=b"/X Do", more=(*nested, stream(form, BLUE)))


def many_pages(count: int, order: str = "<") -> bytes:
    """A TIFF of `count` pages of 2 x 2 px, each of another gray."""
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    parts, size = [out], 8 + 2 + 9 * 12 + 4 + 4
    for n in range(count):
        base = 8 + n * (size - 8)
        tags = [(256, 2), (257, 2), (258, 8), (259, 1), (262, 1), (273, base + size - 12), (277, 1)]
        tags += [(278, 2), (279, 4)]
        entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags)
        following = 0 if n == count - 1 else base + size - 8
        parts += [
            struct.pack(order + "H", 9),
            entries,
            struct.pack(order + "I", following),
            bytes([n % 256]) * 4,
        ]
    return b"".join(parts)


def test_padding_after_the_end_of_a_pdf_is_no_cut(tmp_path):
    whole = read_sheet(CASES / "16-pdf-trailing-bytes" / "trail.pdf")
    assert whole.shape[:2] == (556, 834)
    path = tmp_path / "a.pdf"
    for padding in (b"", bytes(3000), b"\r\n" * 2000, b"\xff" * 5000, b" \0\x1a" * 1500):
        path.write_bytes(pages(b"") + padding)
        assert read_sheet(path, 72).shape == (200, 100, 3)
    path.write_bytes(pages(b"")[:-6] + bytes(3000))
    with pytest.raises(DataError, match=r"a\.pdf: truncated"):
        read_sheet(path)


def test_a_page_is_as_large_as_its_unit_says(tmp_path):
    path = tmp_path / "a.pdf"
    path.write_bytes(pages(b"/UserUnit 2.5"))
    assert read_sheet(path, 72).shape == (500, 250, 3) and sheet_size(path, 72) == (250, 500)
    packed = zlib.compress(b"<</Type/Page/UserUnit 3>>")
    path.write_bytes(pages(b"")[:-6] + b"/ObjStm>>stream\n" + packed + b"\n%%EOF\n")
    assert sheet_size(path, 72) == (300, 600)
    for others in (b"", b"/UserUnit 2"):  # which page has which is not known here
        path.write_bytes(pages(b"/UserUnit 3", others))
        with pytest.raises(DataError, match="different units"):
            read_sheet(path)


def test_a_page_that_draws_for_ever_costs_its_time_and_no_other_page(tmp_path, monkeypatch):
    monkeypatch.setattr(pdf, "SECONDS", 1)
    (tmp_path / "a.pdf").write_bytes(bomb(12))
    (tmp_path / "b.pdf").write_bytes(pages(b""))
    with pytest.raises(DataError, match=r"a\.pdf#page=1: takes more than 1 s; export it again"):
        read_sheet(find_sheets(tmp_path)[0])
    assert read_sheet(tmp_path / "b.pdf", 72).shape == (200, 100, 3)


@pytest.mark.parametrize("order", ["<", ">"])
def test_each_page_of_a_long_tiff_is_found_at_once(tmp_path, order):
    path = tmp_path / "a.tif"
    path.write_bytes(many_pages(3000, order))
    sheets = find_sheets(path)
    assert [sheet.page for sheet in sheets] == list(range(1, 3001))
    assert [int(read_sheet(sheets[n])[0, 0]) for n in (0, 1, 257, 2999)] == [0, 1, 1, 183]
    assert sheet_size(sheets[-1]) == (2, 2)
    path.write_bytes(many_pages(MAX_PAGES + 1, order))
    with pytest.raises(DataError, match="more than 10000 pages"):
        read_sheet(find_sheets(path)[0])


def test_a_jpeg_of_more_scans_than_any_encoder_writes_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.new("L", (64, 64), 9).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    (tmp_path / "a.jpg").write_bytes(data)
    assert read_sheet(tmp_path / "a.jpg").shape == (64, 64)
    last = data[data.rindex(b"\xff\xda") : -2]
    (tmp_path / "a.jpg").write_bytes(data[:-2] + last * MAX_SCANS + data[-2:])
    with pytest.raises(DataError, match="scans"):
        read_sheet(tmp_path / "a.jpg")


LARGE = """
import resource, sys
from pathlib import Path
from schematics.sheets import read_sheet
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shape = read_sheet(Path(sys.argv[1])).shape
print(*shape, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / shape[0] / shape[1])
"""


@pytest.mark.parametrize("kind", ["webp", "tif"])
def test_a_large_picture_of_few_bytes_takes_a_few_bytes_a_pixel(tmp_path, kind):
    side, path = 6000, tmp_path / f"a.{kind}"
    color = (250, 250, 240) if kind == "webp" else (250, 250, 240, 200)
    options = {"lossless": True, "method": 0} if kind == "webp" else {"compression": "tiff_adobe_deflate"}
    Image.new("RGB" if kind == "webp" else "RGBA", (side, side), color).save(path, **options)
    command = [sys.executable, "-c", LARGE, str(path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert answer[:3] == [str(side), str(side), "3"] and float(answer[3]) < 11  # bytes a pixel


def small_files(kind: str) -> list[bytes]:
    """Files of a few hundred bytes, of each sort that a decoder has code of its own for."""
    if kind == "pdf":
        return [pages(b"", b""), pages(b"/UserUnit 2.5"), bomb(1)]
    image = np.full((40, 60, 3), 255, np.uint8)
    cv2.rectangle(image, (5, 5), (40, 30), (200, 30, 10), 2)
    color = Image.fromarray(image)
    gray, clear = color.convert("L"), color.convert("RGBA")
    turned = Image.Exif()
    turned[0x0112] = 6
    sorts: dict[str, list[tuple[Image.Image, dict]]] = {
        "png": [
            (color, {}),
            (clear, {}),
            (gray.convert("I;16"), {}),
            (color.quantize(7), {"transparency": 0, "exif": turned}),
        ],
        "jpeg": [(color, {"exif": turned}), (gray, {"progressive": True}), (color.convert("CMYK"), {})],
        "tiff": [
            (color, {}),
            (clear, {"compression": "tiff_adobe_deflate"}),
            (color, {"compression": "tiff_lzw"}),
            (color, {"compression": "jpeg"}),
            (gray.convert("1"), {"compression": "group4"}),
        ],
        "webp": [
            (color, {}),
            (clear, {"lossless": True}),
            (color, {"save_all": True, "append_images": [clear]}),
        ],
        "bmp": [(color, {}), (color.quantize(7), {}), (gray.convert("1"), {})],
    }
    files = [many_pages(3), many_pages(3, ">")] if kind == "tiff" else []
    for picture, options in sorts[kind]:
        buffer = io.BytesIO()
        picture.save(buffer, kind.upper(), **options)
        files.append(buffer.getvalue())
    return files


@pytest.mark.parametrize("kind", ["pdf", "tiff", "png", "jpeg", "webp", "bmp"])
def test_changed_bytes_give_a_picture_or_one_line(tmp_path, kind):
    """No traceback, no crash, no hang, and no more memory than the header's pixels may take."""
    (tmp_path / kind).mkdir()
    for number, data in enumerate(small_files(kind)):
        (tmp_path / kind / f"{number}.{kind}").write_bytes(data)
    command = [sys.executable, str(Path(__file__).with_name("changed_bytes.py")), str(tmp_path / kind)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0 and int(answer.stdout) > 0, answer.stderr[-2000:]
