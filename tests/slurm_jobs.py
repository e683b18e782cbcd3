"""What the tests of slurm/ start as a job in Python's place, and what they read of jobs that have run."""

import json
import sys
from pathlib import Path


def program(folder: Path, text: str) -> dict[str, str]:
    """An executable to take Python's place, as an environment."""
    path = folder / "program"
    path.write_text(f"#!{sys.executable} -S\n{text}")
    path.chmod(0o755)
    return {"LINEWORK_PYTHON": str(path)}


def errors(log: Path) -> set[str]:
    """The lines of a job's log that tell an error."""
    return {line for line in log.read_text().splitlines() if line.startswith("error:")}


def steps(exp_dir: Path) -> list[int]:
    """The steps in metrics.jsonl that logged a loss."""
    path = exp_dir / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [entry["step"] for entry in entries if "loss" in entry]
