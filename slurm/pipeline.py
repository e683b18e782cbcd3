"""Chains the stages: unlabelled drawings -> backbone -> detector -> COCO figures.

    python slurm/pipeline.py submit --run-dir RUN --unlabeled POOL --data-dir LABELLED
           [--method METHOD] [--pretrain FLAGS] [--pretrain-detector FLAGS] [--finetune FLAGS]
           [--evaluate FLAGS] [--sbatch FLAGS] [--dry-run | --local]
    python slurm/pipeline.py status --run-dir RUN [--json]
    python slurm/pipeline.py cancel --run-dir RUN
    python slurm/pipeline.py doctor [--run-dir RUN] [--nodes node[1-8] | --nodes all]

Each stage is a job that starts when the one before has succeeded, from a snapshot of the code in RUN/code.
With --pretrain-detector, whose FLAGS may be "", the detector's other parts are pretrained on the unlabelled
drawings too, between pretrain and finetune.
The same `submit` again goes on where a chain stopped.

What comes out: RUN/pretrain/backbone.safetensors, RUN/finetune/model.pt, RUN/evaluate/metrics.json and
report.html, logs in RUN/logs. `submit` itself takes seconds, with --local as long as the stages do: minutes
for the sheets of `make demo` on two CPU cores. docs/slurm.md has more; docs/results.md has times of stages.
Any Python from 3.10 runs this, without any package but for `doctor`, which needs torch.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))  # `cluster`, also where it is not installed

import doctor
import stages
import status

from cluster.entry import live
from cluster.errors import USAGE, UserError
from cluster.snapshot import methods, snapshot

FEW_LABELS = "--paste 4"  # of finetuning: what was found to pay with few labels, docs/few-labels.md
DEFAULT = "vicreg"  # the method where --method is not given; pretrain.slurm has the same


def submit(args: argparse.Namespace) -> None:
    """Submit, or run here, every stage from the first that is not finished."""
    if not args.local and not args.dry_run and not shutil.which("sbatch"):
        raise UserError("sbatch: not found, so this machine has no Slurm; --local runs the chain here")
    for flag, folder in (("--data-dir", args.data_dir), ("--unlabeled", args.unlabeled)):
        if not folder.exists():
            raise UserError(f"{flag} {folder}: no such folder")
    given = {name: getattr(args, name.replace("-", "_")) for name in stages.STAGES}
    flags = {name: text for name, text in given.items() if text is not None}
    of_stage = {name: getattr(args, f"sbatch_{name.replace('-', '_')}") for name in stages.STAGES}
    sbatch = {"": args.sbatch, **of_stage}
    if args.few_labels:
        flags["finetune"] = f"{FEW_LABELS} {flags['finetune']}".strip()
    run_dir = args.run_dir
    chain = stages.chain(run_dir, args.data_dir, args.unlabeled, args.method, flags, sbatch)
    if not args.dry_run:
        stages.refuse_without_torch()
    with contextlib.nullcontext() if args.dry_run else stages.locked(run_dir):
        if not args.local:
            for stage in chain:
                stages.warn_of_short_time(stage)
        submit_rest(args, chain, flags)


def submit_rest(args: argparse.Namespace, chain: list[stages.Stage], flags: Mapping[str, str]) -> None:
    """Submit, or run here, the stages of `chain` from the first that is not finished."""
    run_dir = args.run_dir
    record = stages.read_record(run_dir) if (run_dir / "pipeline.json").exists() else {}
    if record:
        refuse_twice(run_dir, record, args.method)
        refuse_other_stages(run_dir, flags, record["flags"])
    while chain and is_done(chain[0], flags, record.get("flags", flags)):
        print(f"{'# ' * args.dry_run}{chain.pop(0).name}: finished")
    if args.dry_run:
        dry_run(chain, run_dir, args.local)
    elif chain:
        code = snapshot(run_dir)
        environment = stages.job_environment(os.environ)
        # Figures that are there were made of another detector, or with other flags.
        (run_dir / "evaluate" / "metrics.json").unlink(missing_ok=True)
        write = functools.partial(stages.write_record, run_dir, args.method, again(), flags)
        if args.local:
            write({})
            run_here(chain, code, environment)
        else:
            submit_chain(chain, run_dir, code, environment, record.get("jobs", {}), write)


def is_done(stage: stages.Stage, flags: Mapping[str, str], recorded: Mapping[str, str]) -> bool:
    """Whether a stage is finished and was made with these flags; with other flags evaluate is made again.

    Raises UserError for another stage that was made with other flags, as later stages were made from it.
    """
    if not stage.finished():
        return False
    same = stages.split(flags[stage.name], "") == stages.split(recorded[stage.name], "")
    if same or stage.name == "evaluate":
        return same
    raise UserError(
        f'--{stage.name} "{flags[stage.name]}": {stage.name} is finished, made with '
        f'"{recorded[stage.name]}"; give these flags again, or another --run-dir'
    )


def refuse_twice(run_dir: Path, record: Mapping[str, Any], method: str) -> None:
    """Raise UserError when jobs of an earlier submission live, or when it was for another method."""
    jobs = status.jobs_of(record, run_dir / "code")
    alive = [f"{name} (job {job.id} {job.state})" for name, job in jobs.items() if job.alive]
    if alive:
        raise UserError(
            f"{run_dir} has jobs alive: {', '.join(alive)}; wait for them, or end them with: "
            f"{again('cancel', '--run-dir', str(run_dir))}"
        )
    if record["method"] != method:
        raise UserError(
            f"{run_dir} is a {record['method']} run; give --method {record['method']} or another --run-dir"
        )


def refuse_other_stages(run_dir: Path, flags: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Raise UserError when the chain in the run-dir has another set of optional stages."""
    for name in stages.OPTIONAL:
        if (name in flags) != (name in recorded):
            cure = f'give --{name} "{recorded[name]}"' if name in recorded else f"leave out --{name}"
            raise UserError(f"{run_dir} was submitted with other stages; {cure}, or another --run-dir")


def submit_chain(
    chain: list[stages.Stage],
    run_dir: Path,
    code: Path,
    environment: dict[str, str],
    known: Mapping[str, str],
    write: Callable[[dict[str, str]], None],
) -> None:
    """Submit each stage as a job that waits for the one before; leave no job behind when one is refused.

    known holds the jobs of stages that are finished: they are recorded further, for the sake of their logs.
    """
    (run_dir / "logs").mkdir(exist_ok=True)
    jobs = dict(known)
    new: list[str] = []
    for stage in chain:
        argv = stages.command(stage, run_dir, code, after=new[-1] if new else None)
        answer = subprocess.run(argv, env=environment, capture_output=True, text=True)
        if answer.returncode:
            if new:
                subprocess.run(["scancel", *new])
            reason = " ".join(answer.stderr.split()) or f"exit code {answer.returncode}"
            raise UserError(f"sbatch refused {stage.name} ({reason}); no job is left of it: check --sbatch")
        new.append(answer.stdout.strip().split(";")[0])
        jobs[stage.name] = new[-1]
        write(jobs)
        print(f"{stage.name}: job {new[-1]}" + (f", after {new[-2]}" if len(new) > 1 else ""))
    print(f"see:  {again('status', '--run-dir', str(run_dir))}")


def run_here(chain: list[stages.Stage], code: Path, environment: dict[str, str]) -> None:
    """Run the stages one after the other on this machine, up to the first that fails."""
    for stage in chain:
        print(f"{stage.name}: {shlex.join(stages.local_command(stage, code))}", flush=True)
        ended = wait(subprocess.Popen(stages.local_command(stage, code), cwd=code, env=environment))
        if ended:
            raise UserError(f"{stage.name} ended with exit code {ended}; the same command goes on there")


def wait(process: subprocess.Popen) -> int:
    """The exit code of a stage. A Ctrl-C reaches the stage as well, which is given the time to save."""
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            return process.wait()


def dry_run(chain: list[stages.Stage], run_dir: Path, local: bool) -> None:
    """Print the commands of `submit` as a shell script, and write nothing."""
    code = run_dir / "code"
    python = stages.job_environment(os.environ)["LINEWORK_PYTHON"]
    print(f"export LINEWORK_PYTHON={shlex.quote(python)}")
    before = None
    for stage in chain:
        if local:
            print(f"cd {shlex.quote(str(code))} && {shlex.join(stages.local_command(stage, code))}")
            continue
        line = shlex.join(stages.command(stage, run_dir, code, after="JOB" if before else None))
        print(f"{stage.name}=$({line.replace('afterok:JOB', f'afterok:${before}')})")
        before = stage.name


def show_status(args: argparse.Namespace) -> None:
    """Print the table of the chain, and why it does not go on where it stands still."""
    record = stages.read_record(args.run_dir)
    told = []
    try:
        jobs = status.jobs_of(record, args.run_dir / "code")
    except UserError as error:
        jobs, told = {name: status.Job(number) for name, number in record["jobs"].items()}, [str(error)]
    nothing = dict.fromkeys(("", *stages.STAGES), "")
    flags = dict.fromkeys(record["flags"], "")
    chain = stages.chain(args.run_dir, Path(), Path(), record["method"], flags, nothing)
    lines = status.lines_of(chain, jobs, args.run_dir / "logs")
    told += status.explain(lines, again("cancel", "--run-dir", str(args.run_dir)), record["command"])
    print(status.as_json(lines, told) if args.json else "\n".join([status.table(lines), *told]))


def cancel(args: argparse.Namespace) -> None:
    """End the jobs of this chain that are alive."""
    jobs = status.jobs_of(stages.read_record(args.run_dir), args.run_dir / "code")
    alive = [job.id for job in jobs.values() if job.alive]
    if not alive:
        print(f"{args.run_dir}: no job of this chain is alive")
        return
    answer = subprocess.run(["scancel", *alive], capture_output=True, text=True)
    if answer.returncode:
        raise UserError(f"scancel {' '.join(alive)}: {' '.join(answer.stderr.split())}")
    print(f"cancelled {', '.join(alive)}")


def again(*arguments: str) -> str:
    """This program as a line to type: with these arguments, or with those that it was called with."""
    return shlex.join(["python", sys.argv[0], *(arguments or sys.argv[1:])])


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong command line is told in one line."""

    def error(self, message: str) -> NoReturn:
        cure = f"{self.prog} --help lists the flags"
        if "required" in message and self.prog.endswith(" submit"):
            cure = f"python {self.prog} --run-dir RUN --unlabeled SHEETS --data-dir DATA"
        self.exit(USAGE, f"error: {message}; {cure}\n")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line. Paths come out absolute, as the stages run in another folder."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=as_written, allow_abbrev=False)
    actions: Any = parser.add_subparsers(required=True, metavar="submit|status|cancel|doctor")

    def action(name: str, main: Any) -> argparse.ArgumentParser:
        text = main.__doc__.splitlines()[0]
        sub = actions.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(main=main)
        return sub

    add_submit(action("submit", submit))
    show = action("status", show_status)
    show.add_argument("--run-dir", type=folder, required=True, help="Folder of the chain to show.")
    show.add_argument("--json", action="store_true", help="Print JSON for a program instead of a table.")
    end = action("cancel", cancel)
    end.add_argument("--run-dir", type=folder, required=True, help="Folder of the chain to end.")
    check = action("doctor", doctor.main)
    check.add_argument(
        "--run-dir",
        type=path,
        default=Path.cwd(),
        help="Folder whose disk is tried; default: the current folder.",
    )
    check.add_argument(
        "--nodes", help="Check these nodes, one task on each: a Slurm host list such as node[1-8], or all."
    )
    check.add_argument(
        "--srun",
        default="",
        metavar="FLAGS",
        help="Flags of srun, in quotes, that get the nodes: partition, account, GPUs.",
    )
    check.add_argument("--json", action="store_true", help="Print each report as one line of JSON.")
    return parser.parse_args(joined(argv))


def add_submit(run: argparse.ArgumentParser) -> None:
    """The flags of `submit`."""
    run.add_argument(
        "--run-dir",
        type=folder,
        required=True,
        help="Folder of the chain, on a file system that all nodes see.",
    )
    run.add_argument("--unlabeled", type=path, required=True, help="Folder of unlabelled drawings.")
    run.add_argument(
        "--data-dir",
        type=path,
        required=True,
        help="Folder of labelled sheets, with train/, valid/ and test/ in it.",
    )
    run.add_argument(
        "--method",
        choices=methods(),
        default=DEFAULT,
        help=f"Method of pretraining; default: {DEFAULT}.",
    )
    run.add_argument(
        "--few-labels",
        action="store_true",
        help=f"Finetune with {FEW_LABELS}, which pays where labels are few; flags in --finetune win over it.",
    )
    for name in stages.STAGES:
        optional = name in stages.OPTIONAL
        run.add_argument(
            f"--{name}",
            default=None if optional else "",
            metavar="FLAGS",
            help=f"Flags of the {name} stage, in quotes{'; without this the chain has none' * optional}.",
        )
    run.add_argument(
        "--sbatch", default="", metavar="FLAGS", help="Flags of sbatch for every stage, in quotes."
    )
    for name in stages.STAGES:
        run.add_argument(
            f"--sbatch-{name}",
            default="",
            metavar="FLAGS",
            help=f"Flags of sbatch for the {name} stage, in quotes; they win over --sbatch.",
        )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="Print the commands as a shell script; submit nothing and write nothing.",
    )
    run.add_argument("--local", action="store_true", help="Run the chain on this machine, without Slurm.")


def path(text: str) -> Path:
    return Path(text).absolute()


def folder(text: str) -> Path:
    """The one name of a run-dir, by whatever symbolic links it was given."""
    return Path(text).resolve()


def joined(argv: list[str]) -> list[str]:
    """The words of a command line, with each value that is itself flags joined to its flag by an equals sign.

    Otherwise argparse would take such a value, which begins with a dash, for a flag of its own.
    """
    kinds = [f"--{kind}{name}" for name in stages.STAGES for kind in ("", "sbatch-")]
    holders = {"--sbatch", "--srun", *kinds}
    words: list[str] = []
    for word in argv:
        if words and words[-1] in holders:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def main() -> None:
    args = parse(sys.argv[1:])
    try:
        args.main(args)
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"--run-dir {args.run_dir}: {what}; mend that, or give another --run-dir") from None


if __name__ == "__main__":
    live(main)
