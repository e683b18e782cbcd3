"""Compare runs that suffer faults with undisturbed runs, on a real two-node Slurm on this machine.

    python tests/faults/chaos.py [--methods simclr vicreg finetune] [--workers 0 2] [--ranks 2] [--faults 20]
                               [--undisturbed 2] [--seed 0] [--parts runs kills overhead]
                               [--results docs/results.md]

runs: one seed, on both nodes, for each number of ranks (from three on, sums depend on their order). Each
method runs undisturbed twice, and then once for each number of workers with faults at random steps: kill -9
of a rank, kill -9 during the write of a checkpoint, USR2, preemption by a job of a higher partition, a node
set down, a slurmd that dies, a power cut, a flipped bit in the newest checkpoint. Every logged number (as
hex) and the sha256 of every result must equal those of the
undisturbed run. kills, overhead: see writes.py.

This needs Debian's slurm-wlm, munge and iproute2, and root (see docs/slurm.md). A run with faults takes about
8 minutes on two shared cores, so `runs` takes an hour; kills takes 2 minutes, overhead about 8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests")]
import page  # noqa: E402
import writes  # noqa: E402
from slurm_cluster import NODES, Cluster  # noqa: E402

# Small models (checkpoints of 13 and 25 MB), since two cores have to import torch about 150 times.
PRETRAIN = "--arch test_resnet --projector 1024 1024 --window 96 --image-size 32"
FINETUNE = "--backbone none --arch test_resnet --fpn-channels 32 --window 128"
FLAGS = {
    "simclr": f"pretrain.slurm simclr {PRETRAIN}",
    "vicreg": f"pretrain.slurm vicreg {PRETRAIN}",
    "finetune": f"finetune.slurm {FINETUNE}",
}
SHARE = {"simclr": 2, "vicreg": 2, "finetune": 1}  # windows in a batch for each rank
STEPS = {"simclr": 25, "vicreg": 25, "finetune": 8}  # for each fault; a run has a fifth more, for delays
INTERVAL = 0.5  # seconds between checkpoints
PRODUCTS = {"simclr": "backbone.safetensors", "vicreg": "backbone.safetensors", "finetune": "model.pt"}


class Trial:
    """One run of so many ranks, as a Slurm job on both nodes."""

    def __init__(
        self,
        site: Cluster,
        folder: Path,
        method: str,
        ranks: int,
        workers: int,
        steps: int,
        partition: str,
    ):
        self.site = site
        self.exp_dir = folder / "exp"
        self.log = folder / "log"
        self.checkpoints = self.exp_dir / "checkpoints"
        self.metrics = self.exp_dir / "metrics.jsonl"
        script, *flags = FLAGS[method].split()
        data = folder.parent / "drawn" / ("" if method == "finetune" else "unlabeled")
        flags += f"--workers {workers} --steps {steps} --log-every 1 --checkpoint-every {INTERVAL}".split()
        flags += ["--batch-size", str(SHARE[method] * ranks)]
        folder.mkdir()
        self.job = site.sbatch(
            "-N2",
            f"-n{ranks}",
            "-c2",
            "-p",
            partition,
            "-o",
            self.log,
            ROOT / "slurm" / script,
            *flags,
            "--data-dir",
            data,
            "--exp-dir",
            self.exp_dir,
            cwd=ROOT,
            env={"LINEWORK_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        )

    def steps(self) -> int:
        """Number of steps done, according to metrics.jsonl."""
        try:
            lines = self.metrics.read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return 0
        whole = [line for line in lines if line.endswith("\n") and '"loss"' in line]  # not of a validation
        return json.loads(whole[-1])["step"] + 1 if whole else 0

    def resumed(self) -> list[int]:
        """The step from which each later launch resumed."""
        text = self.log.read_text() if self.log.exists() else ""
        return [int(step) for step in re.findall(r"^going on from .*/step_(\d+)\.pt$", text, re.M)]

    def saved_since(self, when: float) -> bool:
        return writes.written_since(self.checkpoints, when)

    def until(self, there: Callable[[], Any], seconds: float = 600) -> None:
        """Wait until `there` holds. Fails if the job ends before, or after `seconds`.

        On a machine with eight times as much to do as it has cores, four ranks need minutes for a launch.
        """

        def look() -> bool:
            if there():
                return True
            assert self.site.state(self.job) in ("RUNNING", "PENDING", "COMPLETING", "CONFIGURING"), (
                self.tail()
            )
            return False

        self.site.wait_for(look, seconds, self.tail)

    def tail(self) -> str:
        return f"{self.site.show(self.job)}\n{self.log.read_text()[-4000:]}"

    def result(self) -> tuple[list[str], dict[str, str]]:
        """Every logged number as hex, and the sha256 of the final checkpoint and of the stage's results."""
        assert self.site.wait(self.job, timeout=900) == "COMPLETED", self.tail()
        lines = []
        for line in self.metrics.read_text().splitlines():
            figures = json.loads(line)
            lines.append(" ".join(f"{name}={float(value).hex()}" for name, value in figures.items()))
        final = json.loads((self.exp_dir / "final.json").read_text())
        newest = self.checkpoints / f"step_{final['step']:08d}.pt.sha256"
        return lines, {**final["files"], "checkpoint": newest.read_text().split()[0]}


# -- faults: after each of them the run has ended or is about to end


def kill_rank(trial: Trial, rng: random.Random) -> None:
    pids = trial.site.ranks(trial.job)
    os.kill(pids[rng.randrange(len(pids))], 9)


def kill_in_write(trial: Trial, rng: random.Random) -> None:
    """Stop rank 0 and kill it only if its temporary file still exists, so that it dies during the write."""
    rank_0 = trial.site.ranks(trial.job)[0]
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if list(trial.checkpoints.glob(".step_*.pt.tmp-*")):
            time.sleep(rng.uniform(0, 0.1))
            os.kill(rank_0, 19)
            if list(trial.checkpoints.glob(".step_*.pt.tmp-*")):
                break
            os.kill(rank_0, 18)
    os.kill(rank_0, 9)


def usr2(trial: Trial, rng: random.Random) -> None:
    trial.site.run("scancel", "--signal=USR2", trial.job)
    trial.until(lambda: trial.site.state(trial.job) == "PENDING")


def flip_bit(trial: Trial, rng: random.Random) -> None:
    """Flip one bit of the newest checkpoint while the job is requeued and not running."""
    usr2(trial, rng)
    newest = max(trial.checkpoints.glob("step_*.pt"))
    with open(newest, "r+b") as file:
        place = rng.randrange(newest.stat().st_size)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << rng.randrange(8)]))


def preempt(trial: Trial, rng: random.Random) -> None:
    other = trial.site.sbatch("-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
    assert trial.site.wait(other) == "COMPLETED"


def node_down(trial: Trial, rng: random.Random) -> None:
    node = f"node{rng.choice(NODES)}"
    trial.site.run("scontrol", "update", f"nodename={node}", "state=down", "reason=chaos")
    trial.until(lambda: trial.site.state(trial.job) == "PENDING")

    def back() -> bool:  # the node may come back by itself; while it is completing it cannot be resumed
        trial.site.call("scontrol", "update", f"nodename={node}", "state=resume")
        return trial.site.run("sinfo", "-hp", "main", "-n", node, "-o", "%T").strip() == "idle"

    trial.until(back)


def slurmd_dies(trial: Trial, rng: random.Random) -> None:
    """The rank there runs on and nothing can end it. Set the node down, or the run continues for 20 s."""
    k = rng.choice(NODES)
    trial.site.kill_slurmd(k)
    trial.site.run("scontrol", "update", f"nodename=node{k}", "state=down", "reason=chaos")
    trial.until(lambda: trial.site.state(trial.job) == "PENDING")
    trial.site.start_slurmd(k)


def power_cut(trial: Trial, rng: random.Random) -> None:
    k = rng.choice(NODES)
    trial.site.power_cut(k)
    trial.until(lambda: trial.site.state(trial.job) == "PENDING")
    trial.site.boot(k)


FAULTS: dict[str, Callable[[Trial, random.Random], None]] = {
    "kill -9": kill_rank,
    "kill -9 in the write": kill_in_write,
    "USR2": usr2,
    "flipped bit": flip_bit,
    "preemption": preempt,
    "node down": node_down,
    "slurmd dies": slurmd_dies,
    "power cut": power_cut,
}
IN_ALLOCATION = ("kill -9", "kill -9 in the write")  # restarted inside the allocation; the others requeue
MORE = ["kill -9"] * 5 + ["kill -9 in the write", "USR2"] * 2 + ["flipped bit", "preemption", "node down"]


def kinds(faults: int) -> list[str]:
    """The names of that many faults; each kind comes once before any is repeated."""
    return [*FAULTS, *MORE][:faults]


def strike(trial: Trial, kind: str, rng: random.Random) -> dict[str, Any]:
    """Cause one fault and wait for the first new step: steps done again, seconds until that step."""
    lives, old = len(trial.resumed()), trial.metrics.stat().st_ino
    reached = trial.steps()
    began = time.monotonic()
    FAULTS[kind](trial, rng)

    def next_life() -> bool:
        nonlocal reached
        there = len(trial.resumed()) > lives
        reached = max(reached, 0 if there else trial.steps())
        return there

    trial.until(next_life)
    start = trial.resumed()[-1]
    trial.until(lambda: trial.metrics.stat().st_ino != old and trial.steps() > start)
    seconds = time.monotonic() - began
    if kind == "flipped bit":
        assert "its sha256 is not the one written beside it" in trial.log.read_text(), trial.tail()
    print(f"  {kind} at step {reached}: resumed from {start} in {seconds:.1f} s", flush=True)
    return {"kind": kind, "redone": reached - start, "seconds": seconds}


def storm(trial: Trial, steps: int, faults: int, rng: random.Random, told: list[dict[str, Any]]) -> None:
    """Cause a fault in every `steps` steps, each when the current launch has saved a checkpoint."""
    shuffled = kinds(faults)
    rng.shuffle(shuffled)
    for number, kind in enumerate(shuffled):
        life = time.time()
        at = (number + rng.random()) * steps
        trial.until(lambda: trial.steps() > at and trial.saved_since(life))  # noqa: B023
        time.sleep(rng.uniform(0, INTERVAL))
        told.append(strike(trial, kind, rng))


def compare(
    site: Cluster, folder: Path, method: str, ranks: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run one method undisturbed and with faults; a row of the table for each number of workers."""
    steps = STEPS[method] * options.faults * 6 // 5
    wanted, same = None, None
    for number in range(options.undisturbed):
        began = time.monotonic()
        workers = options.workers[number % len(options.workers)]
        calm = Trial(site, folder / f"{method}-calm-{number}", method, ranks, workers, steps, "main").result()
        took = time.monotonic() - began
        print(f"{named(method, ranks)}, workers {workers}, undisturbed: {steps} steps in {took:.0f} s")
        same = None if wanted is None else wanted == calm
        wanted = wanted or calm
        shutil.rmtree(folder / f"{method}-calm-{number}")
    assert wanted is not None
    rows = []
    for number, workers in enumerate(options.workers):
        print(f"{named(method, ranks)}, workers {workers}, seed {options.seed}", flush=True)
        rng = random.Random(f"{options.seed} {named(method, ranks)} {workers}")
        began = time.monotonic()
        place = folder / f"{method}-{workers}"
        trial = Trial(site, place, method, ranks, workers, steps, ("low", "lowgrace")[number % 2])
        told: list[dict[str, Any]] = []
        try:
            storm(trial, STEPS[method], options.faults, rng, told)
            found = trial.result()
        except AssertionError as error:
            print(error, flush=True)
            found = trial.result() if site.state(trial.job) == "COMPLETED" else ([], {})
        rows.append(
            {
                "method": named(method, ranks),
                "workers": workers,
                "steps": steps,
                "told": told,
                "twice": same,
                "identical": found == wanted,
                "sha256": found[1].get(PRODUCTS[method], "none"),
                "minutes": (time.monotonic() - began) / 60,
            }
        )
        print(f"  identical: {yes(found == wanted)}", flush=True)
        site.settle()
        shutil.rmtree(place)
    return rows


def named(method: str, ranks: int) -> str:
    """How a table calls the method, and the number of ranks where it is not two."""
    return method if ranks == len(NODES) else f"{method} at {ranks} ranks"


def yes(true: bool | None) -> str:
    return "-" if true is None else "yes" if true else "NO"


def table(rows: list[dict[str, Any]]) -> str:
    columns = (
        "method",
        "workers",
        "steps",
        "faults",
        "steps redone: sum, max",
        "first new step after a crash, s: median, max",
        "through a requeue, s: median, max",
        "undisturbed twice: equal",
        "with faults: identical",
        "sha256",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        told = row["told"]
        struck = ", ".join(f"{n} {kind}" for kind, n in Counter(t["kind"] for t in told).most_common())
        crash = [t["seconds"] for t in told if t["kind"] in IN_ALLOCATION]
        requeue = [t["seconds"] for t in told if t["kind"] not in IN_ALLOCATION]
        redone = [t["redone"] for t in told]
        lines.append(
            f"| {row['method']} | {row['workers']} | {row['steps']} | {len(told)}: {struck} | {sum(redone)}, "
            f"{max(redone, default=0)} | {spread(crash)} | {spread(requeue)} | {yes(row['twice'])} "
            f"| {yes(row['identical'])} | {row['sha256'][:12]} |"
        )
    return "\n".join(lines)


def spread(seconds: list[float]) -> str:
    return f"{median(seconds):.1f}, {max(seconds):.1f}" if seconds else "-"


def runs(options: argparse.Namespace) -> Iterator[str]:
    """Yield the section of each method, a table."""
    with tempfile.TemporaryDirectory(prefix="linework-chaos-") as name:
        folder = Path(name)
        draw = ["--sheets", "8", "--unlabeled", "8", "--size", "256", "256"]
        command = [sys.executable, "-m", "schematics.synthetic", "--out", str(folder / "drawn"), *draw]
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        site = Cluster()
        try:
            for method, ranks in itertools.product(options.methods, options.ranks):
                rows = compare(site, folder, method, ranks, options)
                options.failed |= not all(
                    row["identical"] and row["twice"] is not False and len(row["told"]) == options.faults
                    for row in rows
                )
                yield f"### Struck by faults: {named(method, ranks)}\n\n{table(rows)}"
        finally:
            site.stop()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=FLAGS, default=list(FLAGS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[len(NODES)], help="on the two nodes together"
    )
    parser.add_argument("--faults", type=int, default=20, help="number of faults in each run, at most 20")
    parser.add_argument(
        "--undisturbed", type=int, choices=(1, 2), default=2, help="number of runs without faults"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument(
        "--parts", nargs="+", choices=("runs", "kills", "overhead"), default=["runs", "kills", "overhead"]
    )
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    options = parser.parse_args()
    options.failed = False
    words = " ".join(["python tests/faults/chaos.py", *sys.argv[1:]])
    parts: dict[str, Callable[[], Iterable[str]]] = {
        "runs": lambda: runs(options),
        "kills": lambda: [writes.kills(options)],
        "overhead": lambda: [writes.overhead(options)],
    }
    for name in options.parts:
        about = (
            f"`{words}`, commit {page.commit()}, {time.strftime('%Y-%m-%d')}; {page.machine()}; load average "
            f"{os.getloadavg()[0]:.1f} at the start; seed of the faults {options.seed}."
        )
        for text in parts[name]():
            print(text, flush=True)
            page.write_section(options.results, [f"{text}\n\n{about}"], INTERVAL)
    return int(options.failed)


if __name__ == "__main__":
    sys.exit(main())
