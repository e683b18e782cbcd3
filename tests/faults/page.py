"""What the faults came to, in docs/results.md: on which machine, of which commit, part by part."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(1, str(ROOT))
from cluster.snapshot import sources  # noqa: E402

HEAD = """\
## Reliability

Struck by faults: two ranks, or as many as a heading says, on the two nodes of a real Slurm
(`tests/slurm_cluster.py`), timm's test_resnet, a checkpoint of 13 MB (pretraining) or 25 MB every
{interval} s. "Identical": every figure of metrics.jsonl as hex, and the sha256 of the final checkpoint and
of all results, are those of the undisturbed run. The two undisturbed runs had different numbers of workers
where two are listed. A requeue includes the waits of this site: SlurmdTimeout 6 s, KillWait 5 s, 6 s for
which a requeued job is held."""


def machine() -> str:
    """The processor, and the versions of what ran on it."""
    import torch

    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    slurm = subprocess.run(["/usr/sbin/slurmctld", "-V"], capture_output=True, text=True).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    cpu = names[0] if names else platform.machine()
    return f"{cores} cores of {cpu}, torch {torch.__version__} on CPU, {slurm}"


def commit() -> str:
    """The commit of the code, and whether files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    dirty = git("status", "--porcelain", "--untracked-files=no", "--", *sources())
    return git("rev-parse", "--short=10", "HEAD") + (" with changes" if dirty else "")


def write_section(path: Path, told: list[str], interval: float) -> None:
    """Write parts between two comments of a page, which is created if absent; other parts are kept."""
    first, last = "<!-- chaos -->", "<!-- /chaos -->"
    page = path.read_text() if path.exists() else "# Results\n"
    if first not in page:
        page = f"{page.rstrip()}\n\n{first}\n{last}\n"
    before, _, rest = page.partition(first)
    section, _, after = rest.partition(last)
    parts = {}  # by heading
    for part in [*section.split("### ")[1:], *(text.removeprefix("### ") for text in told)]:
        parts[part.partition("\n")[0]] = part.strip()
    text = "\n\n".join([HEAD.format(interval=interval), *(f"### {part}" for part in parts.values())])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{before}{first}\n{text}\n{last}{after}")
