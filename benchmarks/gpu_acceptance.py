"""Does this machine with GPUs do what the documentation claims? One line a claim: PASS, FAIL or FIGURE.

    make gpu                                                   # on a machine with GPUs
    python benchmarks/gpu_acceptance.py --tiny --device cpu    # rehearses the lines on a CPU

Exit status 1 if a line says FAIL. What is compared bit for bit on a GPU needs `--deterministic`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

# A server process that imports torch once, and does not touch the GPU; each run is forked from it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pretraining.stage", "detection.stage", "torch.utils.tensorboard"])
failed: list[str] = []


def say(kind: str, claim: str, words: str) -> None:
    """Print the line of a claim. kind: PASS, FAIL or FIGURE."""
    if kind == "FAIL":
        failed.append(claim)
    print(f"{kind:6} {claim}: {words}", flush=True)


def claim(name: str, holds: bool, words: str) -> None:
    say("PASS" if holds else "FAIL", name, words)


class Launch:
    """One module run as `python -m` would, as one process or as ranks, with a log file."""

    def __init__(self, module: str, flags: list[str], log: Path, ranks: int = 1) -> None:
        self.log = log
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.processes: list[BaseProcess] = []
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {name: str(value) for name, value in place.items()} if ranks > 1 else {}
            process = CONTEXT.Process(target=run_module, args=(module, flags, str(log), env))
            process.start()
            self.processes.append(process)

    def end(self, seconds: float = 900.0) -> list[int | None]:
        """The exit statuses, None for a rank that did not end in that time; all ranks are gone then."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def reach(self, exp_dir: Path, step: int, seconds: float = 600.0) -> None:
        """Wait until `step` steps are in the journal."""
        deadline = time.monotonic() + seconds
        while len(losses(exp_dir)) < step:
            if time.monotonic() > deadline or not any(process.is_alive() for process in self.processes):
                raise RuntimeError(f"it did not reach step {step}: {self.last()}")
            time.sleep(0.01)

    def last(self) -> str:
        """The last line of the log."""
        return (self.log.read_text().strip().splitlines() or ["nothing in the log"])[-1]


def run_module(module: str, flags: list[str], log: str, env: dict[str, str]) -> None:
    os.environ |= env
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.argv = [module, *flags]
    if module == "all_reduce":
        return all_reduce(*flags)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def losses(exp_dir: Path) -> list[float]:
    """The loss of each step in the journal, up to a line that is half written."""
    path, found = exp_dir / "metrics.jsonl", []
    with contextlib.suppress(ValueError):
        for line in path.read_text().splitlines() if path.exists() else []:
            entry = json.loads(line)
            found += [float(entry["loss"])] if "loss" in entry else []
    return found


def digest(exp_dir: Path) -> str:
    """sha256 of the backbone that a run has signed."""
    return hashlib.sha256((exp_dir / "backbone.safetensors").read_bytes()).hexdigest()[:12]


@dataclasses.dataclass
class Bench:
    """Where everything is, and how large it is."""

    work: Path
    device: str
    tiny: bool

    @property
    def pretraining(self) -> list[str]:
        """Flags of a short pretraining."""
        import torch

        from cluster.config import RunConfig

        small = "--arch resnet18 --projector 32 16 --window 96 --image-size 32 --batch-size 4 --workers 0"
        large = "--arch resnet50 --projector 2048 2048 --image-size 224 --batch-size 64 --workers 4"
        flags = f"{small if self.tiny else large} --steps {self.steps} --log-every 1".split()
        known = {field.name for field in dataclasses.fields(RunConfig)}
        if "deterministic" in known and torch.device(self.device).type == "cuda":
            flags += ["--deterministic"]
        return [*flags, "--data-dir", str(self.work / "drawn" / "unlabeled"), "--device", self.device]

    @property
    def steps(self) -> int:
        return 6 if self.tiny else 40

    def pretrain(self, name: str, *more: str, ranks: int = 1) -> tuple[Launch, Path]:
        """Start a pretraining in the folder of that name, or go on with it; the launch and the folder."""
        exp_dir = self.work / name
        flags = [*self.pretraining, "--exp-dir", str(exp_dir), *more]
        return Launch("vicreg.pretrain", flags, self.work / f"{name}.log", ranks), exp_dir


def versions(bench: Bench) -> None:
    import torch

    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    words = [
        f"python {platform.python_version()}",
        f"torch {torch.__version__}",
        f"CUDA {torch.version.cuda}",
    ]
    say("FIGURE", "versions", ", ".join([*words, f"driver {driver or 'none'}"]))
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    say("FIGURE", "devices", ", ".join(names) or f"{os.cpu_count()} CPUs, no GPU that torch sees")
    for line in ask("nvidia-smi", "topo", "-m").splitlines():
        say("FIGURE", "topology", line)
    if bench.device != "cpu":
        claim("torch sees a GPU", bool(names), f"{len(names)} GPUs")


def ask(*command: str) -> str:
    """The output of a command; nothing where it is missing or fails."""
    with contextlib.suppress(OSError):
        answer = subprocess.run(command, capture_output=True, text=True)
        return answer.stdout.strip() if answer.returncode == 0 else ""
    return ""


def timed(device: str, work: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Seconds a round after one to warm up, and the peak of memory in GiB above what was held (GPU only)."""
    import torch

    cuda = torch.device(device).type == "cuda"
    work()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(rounds):
        work()
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / rounds
    return seconds, (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else float("nan")


def loss_speed(bench: Bench) -> None:
    import torch

    from simclr.loss import nt_xent
    from vicreg.loss import vicreg_loss

    rows, wide = (16, 64) if bench.tiny else (256, 8192)
    for name, loss, width in (("NT-Xent", nt_xent, min(wide, 128)), ("VICReg", vicreg_loss, wide)):
        z1, z2 = (torch.randn(rows, width, device=bench.device, requires_grad=True) for _ in range(2))

        def both(loss: Callable = loss, z1: torch.Tensor = z1, z2: torch.Tensor = z2) -> None:
            loss(z1, z2)[0].backward()

        seconds, peak = timed(bench.device, both, 5)
        say("FIGURE", f"{name} at N {rows}, D {width}", f"{1e3 * seconds:.2f} ms, {peak:.3f} GiB, both ways")


def step_speed(bench: Bench) -> None:
    """A VICReg step by batch: the whole, the gate's share of it, and the data's at the best loader."""
    import torch
    from torch.utils.data import DataLoader

    from cluster.backbone import Normalise, build_backbone
    from cluster.guard import Guard
    from cluster.training import GuardedStep
    from pretraining.data import Pairs, epoch_order
    from pretraining.encoder import Encoder, build_projector
    from schematics.recipes import default_extent
    from schematics.store import WindowStore, build_store
    from vicreg.loss import vicreg_loss

    side = 32 if bench.tiny else 224
    build_store(bench.work / "drawn" / "unlabeled", bench.work / "store", 96 if bench.tiny else 448, None)
    store = WindowStore(bench.work / "store")
    extent = min(store.side, default_extent(side, store.line))
    pairs, order = Pairs(store, "drawing", side, extent, 0, 1.0, True), epoch_order(0, len(store))(0)
    counts = [0] if bench.tiny else [0, *(n for n in (1, 2, 4, 8, 16) if n <= (os.cpu_count() or 1))]
    rates = {}
    for workers in counts:
        number = 16 if bench.tiny else 512
        keys = [[(0, n, int(order[n % len(order)])) for n in range(i, i + 16)] for i in range(0, number, 16)]
        start = time.perf_counter()
        for _ in DataLoader(pairs, batch_sampler=keys, num_workers=workers):
            pass
        rates[workers] = number / (time.perf_counter() - start)
        say("FIGURE", f"loader, {workers} workers", f"{rates[workers]:.0f} pairs/s")

    arch, widths = ("resnet18", [32, 16]) if bench.tiny else ("resnet50", [8192, 8192, 8192])
    cuda = torch.device(bench.device).type == "cuda"
    for batch in (4,) if bench.tiny else (32, 128, 256):
        backbone = build_backbone(arch)
        normalise = Normalise(store.mean, store.std, torch.channels_last)
        projector = build_projector([int(backbone.num_features), *widths], False)
        encoder = Encoder(normalise, backbone, projector, False).to(bench.device)
        optimizer = torch.optim.SGD(encoder.parameters(), lr=1e-4)
        guarded = GuardedStep(
            encoder, optimizer, lambda _: 1e-4, Guard(), torch.device(bench.device), precision="auto"
        )
        views = [
            torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, device=bench.device)
            for _ in range(2)
        ]

        def gated(guarded: GuardedStep = guarded, encoder: Encoder = encoder, views: list = views) -> None:
            with guarded.forward():
                z1, z2 = encoder(*views)
            guarded.take(0, vicreg_loss(z1.float(), z2.float())[0])

        def plain(
            optimizer: torch.optim.Optimizer = optimizer, encoder: Encoder = encoder, views: list = views
        ) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(views[0].device.type, torch.bfloat16, enabled=cuda):
                z1, z2 = encoder(*views)
            vicreg_loss(z1.float(), z2.float())[0].backward()
            optimizer.step()

        rounds = 2 if bench.tiny else 10
        seconds, peak = timed(bench.device, gated, rounds)
        bare = timed(bench.device, plain, rounds)[0]
        speed = batch / seconds
        data = max(0.0, 1 - max(rates.values()) / speed)
        say(
            "FIGURE",
            f"VICReg step of {batch} windows, {arch}",
            f"{1e3 * seconds:.1f} ms, {speed:.0f} images/s, peak {peak:.2f} GiB, the gate's share "
            f"{100 * max(0.0, 1 - bare / seconds):.0f} %, the data's {100 * data:.0f} %",
        )
        del backbone, encoder, optimizer, guarded, views


def repeats(bench: Bench) -> None:
    """Twice, killed and resumed, stopped by USR2 and resumed: the same weights each time."""
    launch, first = bench.pretrain("first")
    claim("a pretraining runs", launch.end() == [0], launch.last())
    whole = digest(first)
    exact = bench.device == "cpu" or "--deterministic" in bench.pretraining

    def equal(name: str, exp_dir: Path, words: str = "") -> None:
        other = digest(exp_dir)
        say(
            ("PASS" if other == whole else "FAIL") if exact else "FIGURE",
            name,
            f"sha256 {other}, {'equal' if other == whole else f'undisturbed {whole}'}{words}",
        )

    launch, second = bench.pretrain("second")
    launch.end()
    equal("the same run twice", second)
    for name, number, status in (("killed", signal.SIGKILL, -9), ("stopped by USR2", signal.SIGUSR2, 75)):
        launch, exp_dir = bench.pretrain(name.split()[-1], "--checkpoint-every", "0")
        launch.reach(exp_dir, bench.steps // 3)
        os.kill(launch.processes[0].pid or 0, number)
        (code,) = launch.end()
        claim(f"{name}: the exit status", code == status, f"{code}, expected {status}")
        launch, _ = bench.pretrain(name.split()[-1], "--checkpoint-every", "0")
        launch.end()
        equal(f"{name} and resumed", exp_dir)


def finetuning(bench: Bench) -> None:
    """Finetuning in bf16, then the same sheet by the CPU and by the device."""
    import torch

    from detection.inference import detect, load_detector
    from schematics.sheets import find_sheets, read_sheet

    cuda = torch.device(bench.device).type == "cuda"
    precision = "bf16" if cuda else "fp32"
    small = "--window 128 --fpn-channels 32 --batch-size 2 --workers 0 --steps 2"
    size = small if bench.tiny else "--window 512 --batch-size 4 --workers 4 --steps 60"
    data, exp_dir = bench.work / "drawn", bench.work / "detector"
    folders = ["--data-dir", str(data), "--exp-dir", str(exp_dir)]
    backbone = ["--backbone", str(bench.work / "first" / "backbone.safetensors")]
    flags = [*folders, *backbone, "--device", bench.device, "--precision", precision, "--log-every", "1"]
    launch = Launch("detection.finetune", [*flags, *size.split()], bench.work / "finetune.log")
    code = launch.end()
    told = losses(exp_dir)
    finite = bool(told) and all(abs(value) < float("inf") for value in told)
    claim(f"finetuning in {precision}", code == [0] and finite, f"{len(told)} losses, {launch.last()}")

    image = read_sheet(find_sheets(data / "test")[0])
    here, there = (detect(load_detector(exp_dir / "model.pt", name), image) for name in ("cpu", bench.device))
    top = min(20, len(here.scores))
    found = 0
    for box, score, label in zip(here.boxes[:top], here.scores[:top], here.labels[:top], strict=True):
        near = abs(there.boxes - box).max(axis=1) < 4 if len(there.boxes) else []
        found += any((near) & (there.labels == label) & (abs(there.scores - score) < 0.05))
    words = f"{found} of the {top} best found within 4 px and 0.05"
    claim(f"detections of the CPU on {bench.device}", found >= 0.9 * top, words)


def two_ranks(bench: Bench) -> None:
    """One rank against two, a rank that is killed, a rank that is stopped, and the speed of a sum."""
    import torch

    cuda = torch.device(bench.device).type == "cuda"
    if cuda:
        first = []
        for ranks in (1, 2):
            launch, exp_dir = bench.pretrain(f"ranks{ranks}", "--precision", "fp32", ranks=ranks)
            launch.end()
            first.append(losses(exp_dir)[0])
        ratio = first[1] / first[0]
        claim("the first loss of 2 ranks under SyncBN over that of 1", abs(ratio - 1) < 1e-3, f"{ratio:.6f}")
    for name, number in (("SIGKILL", signal.SIGKILL), ("SIGSTOP", signal.SIGSTOP)):
        flags = ["--checkpoint-every", "0", "--step-timeout", "5" if bench.tiny else "20"]
        launch, exp_dir = bench.pretrain(f"rank-{name}", *flags, ranks=2)
        launch.reach(exp_dir, 2)
        os.kill(launch.processes[1].pid or 0, number)
        start = time.monotonic()
        code = launch.processes[0].join(120) or launch.processes[0].exitcode
        seconds = time.monotonic() - start
        launch.end(0)
        claim(f"{name} of a rank ends the other", code not in (None, 0), f"status {code} in {seconds:.1f} s")
        again, _ = bench.pretrain(f"rank-{name}", *flags, ranks=2)
        claim(f"{name}: the same command goes on", again.end() == [0, 0], again.last())
    megabytes = 4 if bench.tiny else 256
    launch = Launch("all_reduce", [bench.device, str(megabytes)], bench.work / "sum.log", 2)
    launch.end(120)
    say("FIGURE", f"all_reduce of {megabytes} MB over 2 ranks", launch.last())


def all_reduce(device: str, megabytes: str) -> None:
    """Print the speed of a sum over the ranks: bytes of the tensor over seconds."""
    import torch

    from cluster import distributed

    world = distributed.start(device)
    tensor = torch.ones(int(megabytes) << 18, device=world.device)

    def once() -> None:
        torch.distributed.all_reduce(tensor)
        tensor[-1].item()

    seconds, _ = timed(world.device.type, once, 10)
    if world.main:
        print(f"{tensor.numel() * 4 / seconds / 1e9:.2f} GB/s")
    distributed.stop()


def sections(several: bool) -> Iterator[Callable[[Bench], None]]:
    yield from (versions, loss_speed, step_speed, repeats, finetuning)
    if several:
        yield two_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where to compute")
    parser.add_argument("--tiny", action="store_true", help="small networks and sheets: rehearse the lines")
    args = parser.parse_args()
    import torch

    several = args.device == "cpu" or torch.cuda.device_count() > 1
    with tempfile.TemporaryDirectory(prefix="gpu-acceptance-") as folder:
        bench = Bench(Path(folder), args.device, args.tiny)
        size = ["--sheets", "8", "--unlabeled", "8", "--size", "256", "256"] if args.tiny else []
        drawing = ["--out", str(bench.work / "drawn"), *size]
        Launch("schematics.synthetic", drawing, bench.work / "drawn.log").end()
        for section in sections(several):
            try:
                section(bench)
            except Exception as error:  # what breaks here is what there is to report; the rest is tried
                say("FAIL", section.__name__, f"{type(error).__name__}: {' '.join(str(error).split())}")
    if not several:
        say("FIGURE", "two ranks", "not tried, as there is one GPU")
    print(f"{len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
