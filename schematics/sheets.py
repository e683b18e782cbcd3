"""Find drawings, read and write them: image files and PDF pages in, uint8 arrays out, or one clear error.

Gray drawings stay gray and those in color stay in color; 16-bit, 1-bit, palette, CMYK and transparent files
all become 8-bit gray or RGB. A file that is cut short is an error, never a picture whose rest is gray.
"""

import mmap
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from schematics import pdf
from schematics.containers import begin_with, is_whole, jpeg_scans, tiff_pages

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".pdf")
MAX_PIXELS = 20_000 * 20_000
# Pillow warns above a limit of its own and raises above twice that. A large scanned sheet is above both.
Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, MAX_PIXELS)
# Whatever Pillow warns of here ends as a DataError, beside which its warning would be a second line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
MAX_SCANS = 64  # of a progressive JPEG; each is a pass over all pixels, and encoders write about 10
BAND = 64  # rows, of which three channels stay in the processor's cache
STRIPE = 1024  # rows worked on at a time, so that a sheet of 400 megapixels needs no second copy in memory


class DataError(Exception):
    """Bad input, in one line that names the file and the cure."""

    # The status with which a command ends. An exception that carries `exit_status` is one line for the person
    # at the keyboard, any other is a traceback: cluster/errors.py has the same convention.
    exit_status = 1


@dataclass(frozen=True)
class Sheet:
    """One drawing: an image file, or one page (counted from 1) of a PDF or of a multi-page TIFF."""

    path: Path
    page: int | None = None

    @property
    def name(self) -> str:
        """The path in posix form, with "#page=N" where the file has pages."""
        return self.path.as_posix() + ("" if self.page is None else f"#page={self.page}")


def find_sheets(root: Path) -> list[Sheet]:
    """All sheets at `root`, sorted. It may be a file, a folder or a tree of folders, such as COCO splits.

    A PDF or a multi-page TIFF gives a sheet for each page. Hidden files and folders and files that are no
    drawings are passed over. Whether a sheet can be decoded shows only in `read_sheet`. Raises DataError if
    there is none.
    """
    root = Path(root)
    if not root.exists():
        raise DataError(f"{root}: no such file or folder")
    files = [root] if root.is_file() else sorted(walk(root))
    sheets = [sheet for file in files if file.suffix.lower() in SUFFIXES for sheet in _pages(file)]
    if not sheets:
        raise DataError(f"{root}: no drawings found; give png, jpg, tif, bmp, webp or pdf files")
    return sheets


def walk(root: Path) -> Iterator[Path]:
    """Yield all files below `root` that are not hidden, through links too."""
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # A folder is entered once: a link back to one of its parents would lead round in circles.
        subfolders[:] = [] if real in seen else [s for s in subfolders if s[0] != "." and s != "__MACOSX"]
        if real not in seen:
            seen.add(real)
            yield from (Path(folder, name) for name in names if name[0] != ".")


def _pages(path: Path) -> list[Sheet]:
    """The sheets of a file, one a page. A file that can't be opened is one sheet: reading it tells why."""
    try:
        if path.suffix.lower() == ".pdf":
            return [Sheet(path, page) for page in range(1, pdf.page_count(path) + 1)]
        if path.suffix.lower() in (".tif", ".tiff"):
            with open(path, "rb") as file:
                pages = [page for page, (_, copy) in enumerate(tiff_pages(file), 1) if not copy]
                return [Sheet(path, page) for page in pages] if len(pages) > 1 else [Sheet(path)]
    except Exception:  # on broken bytes a decoder may raise anything
        return [Sheet(path)]
    return [Sheet(path)]


def read_sheet(sheet: Sheet | Path, dpi: int = 200) -> np.ndarray:
    """Decode one sheet into uint8 [H, W] (gray) or [H, W, 3] (RGB).

    A file with three equal channels comes back gray. Values of 16 bits are scaled to 8, transparency is laid
    over white, an EXIF rotation is applied. dpi: resolution of PDF pages.
    Raises DataError if the file is missing, truncated, damaged or above 400 megapixels.
    """
    sheet = sheet if isinstance(sheet, Sheet) else Sheet(Path(sheet))
    with _errors_named(sheet):
        if sheet.path.suffix.lower() == ".pdf":
            return _gray_if_equal(pdf.render(sheet.path, sheet.page or 1, dpi, MAX_PIXELS))
        return _gray_if_equal(_decode(sheet))


def sheet_size(sheet: Sheet | Path, dpi: int = 200) -> tuple[int, int]:
    """Width and height of what `read_sheet` would give, in px, from the header alone.

    Raises DataError if the file is missing, its header can't be read or it is above 400 megapixels.
    """
    return sheet_header(sheet, dpi)[:2]


def sheet_header(sheet: Sheet | Path, dpi: int = 200) -> tuple[int, int, int]:
    """Like `sheet_size`, and the EXIF orientation that `read_sheet` undoes: 1 to 8, where 1 is upright."""
    sheet = sheet if isinstance(sheet, Sheet) else Sheet(Path(sheet))
    with _errors_named(sheet):
        if sheet.path.suffix.lower() == ".pdf":
            return (*pdf.page_size(sheet.path, sheet.page or 1, dpi, MAX_PIXELS), 1)
        with _open(sheet.path, sheet.page) as picture:
            (width, height), turn = picture.size, _orientation(picture)
            return (height, width, turn) if turn >= 5 else (width, height, turn)


def to_color(image: np.ndarray, color_mode: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] RGB -> [H, W] for color_mode "gray", [H, W, 3] for "rgb".

    Raises ValueError for any other color_mode.
    """
    if color_mode == "gray":
        return image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    if color_mode == "rgb":
        return image if image.ndim == 3 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    raise ValueError(f"color_mode is {color_mode!r}; gray or rgb")


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an image uint8 [H, W] or [H, W, 3] RGB. Raises OSError if the disk refuses."""
    if image.ndim == 3:
        image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    # Not cv2.imwrite, which only returns False on a full disk and garbles file names on Windows.
    try:
        path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    except OSError as error:
        error.filename = str(path)  # which it lacks when the disk is full
        raise


@contextmanager
def _errors_named(sheet: Sheet) -> Iterator[None]:
    """Turn whatever a decoder raises, which may be anything, into a DataError that names the sheet."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{sheet.name}: no such file") from None
    except PermissionError:
        raise DataError(f"{sheet.name}: permission denied; make it readable") from None
    except pdf.Refused as error:
        raise DataError(f"{sheet.name}: {error}") from None
    except Image.UnidentifiedImageError:
        raise DataError(
            f"{sheet.name}: truncated, or not a png, jpg, tif, bmp, webp or pdf file; export it again"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{sheet.name}: cannot be decoded ({reason}); export it again") from None


@contextmanager
def _open(file: Path | BytesIO, page: int | None = None) -> Iterator[Image.Image]:
    """Open an image file, or one of its pages, with Pillow: the header is read, no pixel is decoded yet."""
    source: Any = file
    if page is not None and isinstance(file, Path):
        with open(file, "rb") as raw:
            source = mmap.mmap(raw.fileno(), 0, access=mmap.ACCESS_COPY)  # which can be changed in memory
    if page is not None:
        begin_with(source, page)
    with Image.open(source, formats=("PNG", "JPEG", "TIFF", "BMP", "WEBP")) as picture:
        width, height = picture.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"{file if isinstance(file, Path) else 'image'}: {width} x {height} px is above"
                " 400 megapixels; split or shrink it"
            )
        yield picture


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, from 1 to 8, that is still to be undone.

    A TIFF has none left, since Pillow turns it by itself. For a PNG without EXIF data in its header Pillow
    would decode the whole file to look for some behind the pixels, so it counts as upright.
    """
    if picture.format == "TIFF" or (picture.format == "PNG" and "exif" not in picture.info):
        return 1
    value = picture.getexif().get(0x0112, 1)
    return value if value in range(1, 9) else 1


def _decode(sheet: Sheet) -> np.ndarray:
    """Decode an image file into uint8 [H, W] or [H, W, 3] RGB."""
    data = sheet.path.read_bytes()
    if not data:
        raise DataError(f"{sheet.name}: empty file; copy or export it again")
    with _open(BytesIO(data), sheet.page) as picture:
        if picture.format == "TIFF" and sheet.page is None:
            tiff_pages(BytesIO(data))  # raises if it is cut between pages, which find_sheets can't tell
        scans = jpeg_scans(data) if picture.format in ("JPEG", "MPO") else 0
        if scans is None or not is_whole(data, picture):
            raise DataError(f"{sheet.name}: truncated; copy or export it again")
        if scans > MAX_SCANS:
            raise DataError(f"{sheet.name}: drawn in more than {MAX_SCANS} scans; export it again")
        turn = _orientation(picture)
        image = _decode_fast(data, picture)
        if image is None:
            image = _decode_any(picture)
    return _turned(image, turn)


def _decode_fast(data: bytes, picture: Image.Image) -> np.ndarray | None:
    """Decode a plain jpg or png with OpenCV, several times faster than Pillow, or a png faster still.

    None for any other file, since OpenCV would read it differently.
    """
    plain = {"JPEG": ("L", "RGB"), "MPO": ("L", "RGB"), "PNG": ("L", "RGB", "RGBA", "I", "I;16")}
    plain["WEBP"] = ("RGB", "RGBA")  # in 6 bytes a pixel, where Pillow takes 21
    if picture.mode not in plain.get(picture.format or "", ()) or "transparency" in picture.info:
        return None
    if picture.format == "WEBP" and getattr(picture, "is_animated", False):
        return None
    if picture.format in ("JPEG", "MPO") and picture.mode == "RGB":
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if (image := _decode_png(data, picture)) is not None:
        return image
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        return None
    if image.dtype == np.uint16:
        image = cv2.convertScaleAbs(image, alpha=1 / 257)
    if image.ndim == 2:
        return image
    if image.shape[2] == 4:
        return _over_white(cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA, dst=image))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)


# What the header of a png says: 8 bits a sample, gray or RGB, and rows in their order.
PNG_MODES = {b"\x08\x00\x00\x00\x00": "mono", b"\x08\x02\x00\x00\x00": "rgb"}


def _decode_png(data: bytes, picture: Image.Image) -> np.ndarray | None:
    """Decode a png of 8 bits with kornia-rs, in a third of the time and half of the memory of OpenCV.

    None where kornia-rs (the extra "fast") is not installed, for any other file, and for one that it refuses:
    the slower decoders then have the last word. Of files whose chunks have the right checksums, as `is_whole`
    proves, pixels are the same.
    """
    mode = PNG_MODES.get(data[24:29]) if picture.format == "PNG" else None
    if mode is None or getattr(picture, "is_animated", False) or (decode := _png_decoder()) is None:
        return None
    width, height = picture.size
    try:
        image = decode(data, (height, width), mode)
    except Exception:  # on broken bytes a decoder may raise anything
        return None
    return image[..., 0] if mode == "mono" else image


@cache
def _png_decoder() -> Callable[[bytes, tuple[int, int], str], np.ndarray] | None:
    """kornia-rs's decoder, which is loaded with the first png."""
    try:
        from kornia_rs.io import decode_image_png_u8
    except ImportError:
        return None
    return decode_image_png_u8


def _decode_any(picture: Image.Image) -> np.ndarray:
    """Decode with Pillow, stripe by stripe. Raises ValueError for 32-bit pixels."""
    if picture.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no fixed white; save it with 8 or 16 bits")
    picture.load()
    if picture.mode.startswith("I;16"):
        return _from_16_bit(picture)
    clear = "A" in picture.getbands() or "a" in picture.mode or "transparency" in picture.info
    mode = "RGBA" if clear else "L" if picture.mode in ("L", "1") else "RGB"
    width, height = picture.size
    image = np.empty((height, width) if mode == "L" else (height, width, 3), np.uint8)
    for top in range(0, height, STRIPE):
        part = picture.crop((0, top, width, min(top + STRIPE, height))).convert(mode)
        image[top : top + STRIPE] = _over_white(np.asarray(part)) if clear else np.asarray(part)
    return image


def _from_16_bit(picture: Image.Image) -> np.ndarray:
    """Gray of 9 to 16 bits -> uint8. A TIFF says how many bits are in use, and whether 0 is white."""
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(258, (16,))[0]
    image = cv2.convertScaleAbs(np.array(picture).astype(np.uint16), alpha=255 / (2**bits - 1))
    return 255 - image if tags.get(262) == 0 else image


def _over_white(rgba: np.ndarray) -> np.ndarray:
    """uint8 RGBA [H, W, 4] -> RGB [H, W, 3], laid over white paper."""
    image = np.empty((*rgba.shape[:2], 3), np.uint8)
    for top in range(0, len(rgba), STRIPE):
        stripe = rgba[top : top + STRIPE].astype(np.uint16)
        alpha = stripe[..., 3:]
        image[top : top + STRIPE] = (stripe[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return image


def _gray_if_equal(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W] if the three channels are equal everywhere, else the image as it is."""
    if image.ndim == 2:
        return image
    few = image[::16, ::16]  # one pixel in color is enough, and most sheets in color have one among these
    if (few[..., :2] != few[..., 1:]).any():
        return image
    for top in range(0, len(image), BAND):
        red, green, blue = cv2.split(image[top : top + BAND])
        if cv2.norm(red, green, cv2.NORM_INF) > 0 or cv2.norm(green, blue, cv2.NORM_INF) > 0:
            return image
    return cv2.extractChannel(image, 0)


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation, which says where row 0 and column 0 belong (Exif 2.32, tag 0x0112)."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)
