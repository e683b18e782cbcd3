"""What Label Studio makes of a sheet's file name, and the name that the sheet had before."""

import re
import unicodedata
from urllib.parse import parse_qs, unquote, urlsplit


def served_path(name: str) -> str:
    """The path in the address under which a file is served; a path that is no address stays as it is.

    "/data/local-files/?d=plans/a%20b.png" is plans/a b.png, "s3://bucket/plans/a.png?key=..." plans/a.png.
    """
    if name.startswith("/data/local-files/"):
        return parse_qs(urlsplit(name).query).get("d", [""])[0]
    # One slash is what is left of two where the address was taken for a path.
    if re.match(r"[a-z][a-z0-9+.-]+:/", name, re.IGNORECASE):
        return unquote(urlsplit(name).path).lstrip("/")
    return name


def before_upload(name: str) -> str:
    """A path without the eight digits that Label Studio puts before the name of each uploaded file."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + re.sub(r"^[0-9a-f]{8}-(?=.)", "", last)


def upload_form(name: str) -> str:
    """What two file names have in common of which one is the other after an upload.

    Blanks are then underscores, and all but letters, digits, "-", "_" and "." is gone (Django's valid names).
    """
    name = unicodedata.normalize("NFC", name).strip().replace(" ", "_")
    return re.sub(r"[^-\w.]", "", name).casefold()
