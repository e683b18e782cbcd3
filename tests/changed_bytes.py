"""A program that reads drawings whose bytes were changed: each must give a picture or one line of error.

    python tests/changed_bytes.py FOLDER

FOLDER holds whole files of one kind. In a process of its own a decoder that crashes, hangs or fills memory
ends this program and not the tests. The file that did it stays in FOLDER as changed.KIND.
"""

import os
import resource
import signal
import struct
import sys
import zlib
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schematics import pdf
from schematics.sheets import DataError, find_sheets, read_sheet, sheet_size

EXAMPLES = 150
SECONDS = 30  # of CPU time that a file may take; a whole one takes some milliseconds
START = 256 << 20  # bytes that a process takes with its libraries and a small sheet
PIXEL = 16  # bytes that decoding may take for each pixel that the header promises
WALL = 8 << 30  # bytes of address space, so that a fault found here does not take the machine down

folder = Path(sys.argv[1])
wholes = [path.read_bytes() for path in sorted(folder.iterdir())]
path = folder / f"changed.{folder.name}"
largest = 0  # pixels of a sheet up to now
read = 0


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """One of the whole files with some bytes exchanged, left out or doubled, or junk behind its head."""
    data = bytearray(draw(st.sampled_from(wholes)))
    if draw(st.integers(0, 9)) == 9:
        return bytes(data[: draw(st.integers(0, 40))]) + draw(st.binary(max_size=60))
    for _ in range(draw(st.integers(0, 5))):
        at, what = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 3))
        if what == 0:
            data[at] = draw(st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255))
        elif what == 1:
            value = draw(st.sampled_from([0, 1, 0x4000, 0x7FFFFFFF, 0xFFFFFFFF]))
            data[at : at + 4] = value.to_bytes(4, draw(st.sampled_from(["big", "little"])))
        elif what == 2:
            del data[at : at + draw(st.integers(1, 30))]
        else:
            data[at:at] = data[at : at + draw(st.integers(1, 30))]
        data = data or bytearray(b"x")
    return with_checksums(bytes(data)) if draw(st.booleans()) else bytes(data)


def with_checksums(data: bytes) -> bytes:
    """A PNG with the right checksums, without which no decoder looks at what was changed."""
    out, at = data[:8], 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + struct.unpack_from(">I", data, at)[0]
        out += data[at:end] + struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return out + data[at:]


def peak() -> int:
    """The most memory that this process or the reader of PDFs has held, in bytes."""
    pids = [os.getpid(), *([pdf._reader.pid] if pdf._reader and pdf._reader.poll() is None else [])]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return max(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changed())
def test(data: bytes) -> None:
    global largest, read
    path.write_bytes(data)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
    for sheet in find_sheets(path)[:3]:
        try:
            width, height = sheet_size(sheet)
            largest = max(largest, width * height)
            assert read_sheet(sheet).shape[:2] == (height, width)
            read += 1
        except DataError as error:
            said = str(error)
            assert path.name in said and len(said.splitlines()) == 1 and "MemoryError" not in said, said
    assert peak() <= START + PIXEL * largest, f"{peak() >> 20} MB for {largest} pixels"


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (WALL, WALL))
    pdf.SECONDS = 2
    test()
    print(read)
