"""How long a command takes before it does its work: --help, a wrong flag, the first step of a small pool.

    python benchmarks/start.py [--rounds 5]

CPU seconds of whole processes, on one thread, with the files in the page cache. The peer of --help and of a
wrong flag is `import torch` alone, with which commands of other projects begin (goal: 0.6 s). A run on eight
sheets, with a ResNet-18 on views of 64 px, is counted up to its first step, beyond the import of torch,
torchvision and timm (goal: 2.5 s): 1.2 s of it are the first step of any optimizer of torch's, which imports
torch's compiler.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from race import ROUNDS, describe_machine, tell_ratio

ROOT = Path(__file__).resolve().parents[1]
HELP, FIRST = 0.6, 2.5  # CPU s, the goals
COMMANDS = (["-m", "vicreg.pretrain"], ["-m", "detection.finetune"], ["evaluate/evaluate.py"])
TORCH, LIBRARIES = ["-c", "import torch"], ["-c", "import torch, torchvision, timm"]


def cpu_of(words: Sequence[str | Path], status: int = 0) -> float:
    """CPU seconds of `python WORDS` and its children, which must end with that status."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode != status:
        sys.exit(f"python {' '.join(map(str, words))}: {done.stderr[-500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def cpu_to_first_step(folder: Path) -> float:
    """CPU seconds of a run and its children until it prints the line of its first step."""
    where = ["--data-dir", folder / "drawn" / "unlabeled", "--exp-dir", tempfile.mkdtemp(dir=folder)]
    small = "--arch resnet18 --projector 512 128 --batch-size 16 --image-size 64 --window 128 --steps 1"
    words = ["-m", "simclr.pretrain", *where, *small.split(), "--workers", "0", "--device", "cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout
        for line in run.stdout:
            if line.startswith("step 1/"):
                ticks = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()[11:15]
                run.terminate()
                return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
    sys.exit(f"python {' '.join(map(str, words))}: no first step")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    rounds = range(parser.parse_args().rounds)
    print(describe_machine("torch", "torchvision", "timm", "tyro"))
    for command in COMMANDS:
        for flag, status in (("--help", 0), ("--wrong-flag", 2)):
            times = [(cpu_of([*command, flag], status), cpu_of(TORCH)) for _ in rounds]
            tell_ratio(f"{command[-1]} {flag}", times, "import torch", None)
            told("", median(ours for ours, _ in times), HELP)
    with tempfile.TemporaryDirectory() as folder:
        cpu_of(["-m", "schematics.synthetic", "--out", Path(folder) / "drawn", "--sheets", "4"])
        apart = [cpu_to_first_step(Path(folder)) - cpu_of(LIBRARIES) for _ in rounds]
    told("up to the line of the first step, beyond the imports", median(apart), FIRST)


def told(what: str, seconds: float, goal: float) -> None:
    missed = "" if seconds <= goal else ", missed"
    print(f"{what or '  that is'}: {seconds:.2f} s of CPU (goal {goal:g}{missed})", flush=True)


if __name__ == "__main__":
    main()
