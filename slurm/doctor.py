"""Is a node fit for a job? Devices, versions, room and speed of the disk, all_reduce between ranks."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import stages

from cluster.errors import UserError
from cluster.rendezvous import place

PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless", "safetensors")
LARGEST = 1.4  # GB of the largest checkpoint, which is VICReg's
ROOM = 4 * LARGEST  # GB that must be free: three checkpoints are kept while a fourth is written
RATE = 1e3 * LARGEST / 60  # MB/s at which such a checkpoint is written in a minute
PROBE = 64  # MiB that are written to try the disk
PATIENCE = 180.0  # seconds in which a node must answer: importing torch from a cold disk takes 20


@dataclass
class Report:
    """What one task found on its node, which is fit for a job when there are no problems."""

    node: str
    cpus: int = 0
    gpus: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    free_gb: float = 0.0
    write_mb_s: float = 0.0
    all_reduce: str = ""
    problems: list[str] = field(default_factory=list)

    def text(self) -> str:
        """What a reader sees: one line of findings, and one for each problem."""
        devices = ", ".join(self.gpus) or f"{self.cpus} CPUs"
        versions = " ".join(f"{name} {version}" for name, version in self.versions.items())
        disk = f"{self.free_gb:.0f} GB free, {self.write_mb_s:.0f} MB/s written and synced"
        found = " · ".join(filter(None, (devices, disk, self.all_reduce, versions)))
        told = [f"  problem: {problem}" for problem in self.problems]
        return "\n".join([f"{self.node}: {found if self.cpus else 'no answer'}", *told])


def main(args: argparse.Namespace) -> None:
    """Check this node, or each of --nodes, before a job is sent there."""
    if args.nodes and not shutil.which("sinfo"):
        raise UserError(
            "--nodes: sinfo not found, so this machine has no Slurm; without --nodes this machine is checked"
        )
    args.run_dir.mkdir(parents=True, exist_ok=True)
    reports = check_nodes(args) if args.nodes else [check_here(args.run_dir)]
    for report in reports:
        print(json.dumps(asdict(report)) if args.json else report.text(), flush=True)
    bad = [report.node for report in reports if report.problems]
    if bad and args.nodes:
        raise UserError(f"{len(bad)} of {len(reports)} nodes unfit; give sbatch --exclude={','.join(bad)}")
    if bad and not args.json:
        raise UserError(f"{bad[0]} is unfit, see above")


def check_here(run_dir: Path) -> Report:
    """What this process finds; beside other ranks under srun also whether the ranks reach each other."""
    report = Report(os.environ.get("SLURMD_NODENAME") or platform.node(), cpus=len(os.sched_getaffinity(0)))
    report.versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            report.versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            report.problems.append(f"{name} is not installed for {sys.executable}")
    checks = {"disk": check_disk, "torch and its devices": check_devices, "all_reduce": check_ranks}
    for what, check in checks.items():
        try:
            check(report, run_dir)
        except Exception as error:  # whatever goes wrong here is what there is to report of the node
            reason = " ".join(str(error).split()) or type(error).__name__
            report.problems.append(f"{what}: {reason}")
    return report


def check_disk(report: Report, run_dir: Path) -> None:
    """How much room the disk of `run_dir` has, and how fast it writes."""
    report.free_gb = shutil.disk_usage(run_dir).free / 1e9
    probe = run_dir / f".doctor-{uuid.uuid4().hex[:8]}"
    block = os.urandom(1 << 20)
    try:
        start = time.perf_counter()
        with open(probe, "wb") as file:
            for _ in range(PROBE):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        report.write_mb_s = PROBE * 1.048576 / (time.perf_counter() - start)
    finally:
        probe.unlink(missing_ok=True)
    if report.free_gb < ROOM:
        report.problems.append(
            f"{report.free_gb:.1f} GB free in {run_dir}: checkpoints take up to {ROOM:.1f} GB"
        )
    if report.write_mb_s < RATE:
        report.problems.append(
            f"{report.write_mb_s:.0f} MB/s: a checkpoint of {LARGEST} GB takes over a minute"
        )


def check_devices(report: Report, run_dir: Path) -> None:
    """Whether torch and torchvision load and compute, on the CPU and on each GPU of the job."""
    import torch
    import torchvision  # its operators load only beside the torch that they were built for

    from cluster import distributed

    torchvision.ops.nms(torch.rand(2, 4), torch.rand(2), 0.5)
    for number in range(torch.cuda.device_count()):
        report.gpus.append(torch.cuda.get_device_name(number))
        square = torch.ones(64, 64, device=f"cuda:{number}")
        square.mm(square).sum().item()
    granted = distributed.gpus_of_process(os.environ)
    if granted > len(report.gpus):
        report.problems.append(f"{granted} GPUs granted, torch sees {len(report.gpus)}: check nvidia-smi")


def check_ranks(report: Report, run_dir: Path) -> None:
    """Whether the ranks of this step reach each other, and how long a sum over all of them takes."""
    me = place()
    if me.size == 1:
        return
    import torch

    from cluster import distributed

    # One task a node shows whether the nodes reach each other; one task a GPU also shows whether NCCL works.
    granted = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0)
    device = "auto" if report.gpus and granted == me.local_size else "cpu"
    world = distributed.start(device, rendezvous=run_dir, timeout=PATIENCE / 3, collective_timeout=30.0)
    try:
        tensor = torch.ones(4 << 20, device=world.device)  # 16 MB
        for _ in range(2):  # the first round makes the connections, so the second one is timed
            tensor.fill_(world.rank)
            distributed.barrier()
            start = time.perf_counter()
            torch.distributed.all_reduce(tensor)
            total = tensor[-1].item()
            seconds = time.perf_counter() - start
        assert total == sum(range(world.size)), f"the sum over {world.size} ranks is {total}"
        who = f"{world.size} ranks on {world.device.type}"
        report.all_reduce = f"all_reduce of 16 MB over {who} in {1e3 * seconds:.0f} ms"
    finally:
        distributed.stop()


def check_nodes(args: argparse.Namespace) -> list[Report]:
    """A report of every node: of each alone, so that a dead one hides none, then of all fit ones together."""
    reports = {report.node: report for report in node_states(args.nodes)}
    fit = [node for node, report in reports.items() if not report.problems]
    for node, started in [(node, start(args, [node])) for node in fit]:
        reports[node] = answers(started, [node])[node]
    fit = [node for node in fit if not reports[node].problems]
    if len(fit) > 1:
        together = answers(start(args, fit), fit)
        if any(report.problems for report in together.values()):  # try each with the first, to see who it is
            for node in fit[1:]:
                together |= answers(start(args, [fit[0], node]), [node])
            if all(together[node].problems for node in fit[1:]) and len(fit) > 2:
                together = {fit[0]: together[fit[0]]}  # it is the first, which all pairs have in common
            elif len(fit) > 2:
                del together[fit[0]]
        reports |= together
    return list(reports.values())


def node_states(wanted: str) -> list[Report]:
    """An empty report of each node of a Slurm host list, or of all; one that Slurm calls unfit says so.

    Raises UserError when there is no such node.
    """
    chosen = [] if wanted == "all" else ["-n", wanted]
    answer = subprocess.run(["sinfo", "-hN", *chosen, "-o", "%N|%T|%E"], capture_output=True, text=True)
    nodes = {}
    for line in answer.stdout.splitlines():
        node, state, reason = line.split("|", 2)
        unfit = state.startswith(("down", "drain", "fail", "unknown", "power")) or state.endswith("*")
        nodes[node] = Report(node, problems=[f"Slurm says {state} ({reason})"] if unfit else [])
    if not nodes:
        reason = " ".join(answer.stderr.split()) or "sinfo lists none"
        raise UserError(f"--nodes {wanted}: no such node ({reason})")
    return list(nodes.values())


def start(args: argparse.Namespace, nodes: list[str]) -> subprocess.Popen[str]:
    """Start this program on each of the nodes, with one task a node unless --srun says otherwise."""
    environment = stages.job_environment(os.environ)
    program = [environment["LINEWORK_PYTHON"], str(Path(__file__).with_name("pipeline.py"))]
    where = [f"--nodes={len(nodes)}", "--ntasks-per-node=1", f"--nodelist={','.join(nodes)}"]
    flags = stages.split(args.srun, "--srun")
    srun = ["srun", "--job-name=linework-doctor", "--kill-on-bad-exit=0", *where, *flags]
    argv = [*srun, *program, "doctor", "--json", "--run-dir", str(args.run_dir)]
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answers(started: subprocess.Popen[str], nodes: list[str]) -> dict[str, Report]:
    """The report of each node; of a node that printed none, one with the last line that srun wrote."""
    try:
        out, err = started.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        started.terminate()
        out, err = started.communicate()
        err += f"no answer in {PATIENCE:.0f} s"
    reports = {}
    for line in filter(None, out.splitlines()):
        try:
            report = Report(**json.loads(line))
        except (ValueError, TypeError):
            continue
        if report.node not in reports or report.problems:
            reports[report.node] = report
    last = (err.strip().splitlines() or ["srun ended without a word"])[-1]
    return {node: reports.get(node) or Report(node, problems=[last]) for node in nodes}
