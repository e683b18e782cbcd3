"""Run every race in benchmarks/ and write what they print to docs/benchmarks.md.

    python benchmarks/bench.py [NAME ...]

A race is a script here that measures by race.py. Peers come with `pip install -e '.[bench]'`. With names,
such as `views losses`, only those races run and the others keep their part of the page, which is the script's
docstring, with what limits ours where a goal is missed, and what it printed. It takes about an hour on two
cores.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Each race runs ours and a named peer at its best flags in turn, in one process with one thread, and counts CPU
seconds; a ratio above 1 means that ours is faster. The goal of a race stands beside its ratio. What limits
ours where a goal is missed is said above the figures. `make bench` writes this page, and
`python benchmarks/bench.py NAME` renews one part of it.
"""


def races() -> list[str]:
    """The names of the scripts that race."""
    scripts = (path for path in sorted(HERE.glob("*.py")) if path.stem not in ("race", "bench"))
    return [path.stem for path in scripts if re.search(r"^\s*from race import", path.read_text(), re.M)]


def story(name: str) -> str:
    """What a race says of itself, for the page."""
    return ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""


def main() -> None:
    wanted = sys.argv[1:] or races()
    if unknown := sorted({*wanted} - {*races()}):
        sys.exit(f"error: {', '.join(unknown)}: no such race; there are {', '.join(races())}")
    parts = (
        dict(re.findall(r"^## (\w+)\n.*?^(`python .*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S))
        if PAGE.exists()
        else {}
    )
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=True
    ).stdout.strip()
    failed = []
    for name in wanted:
        print(f"{name} ...", flush=True)
        done = subprocess.run(
            [sys.executable, str(HERE / f"{name}.py")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        print(done.stdout, flush=True)
        if done.returncode:
            failed.append(name)
            continue
        when = time.strftime("%Y-%m-%d")
        lines = "".join(f"    {line}\n" for line in done.stdout.splitlines())
        parts[name] = f"`python benchmarks/{name}.py` at {commit}, {when}:\n\n{lines}"
        ordered = [f"## {k}\n\n{story(k)}\n\n{parts[k].rstrip()}\n" for k in races() if k in parts]
        PAGE.write_text("\n".join([HEAD, *ordered]))
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed; see above")


if __name__ == "__main__":
    main()
