"""A real two-node Slurm on this one machine, for the tests.

The whole site (munge, slurmctld, two nodes with a network, a hostname and a process table each) lives
inside one process namespace. Its first process dies with the test session, even by kill -9, and
everything else dies with it: no daemon and no network interface can be left behind, and any number of
sites run side by side. Where namespaces can't be had both nodes share the machine's network ("plain").
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NODES = (1, 2)
CPUS, GPUS = 8, 2  # per node; declared, not real: a GPU is a link to /dev/null
FINAL_STATES = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
# Tests wait for SlurmdTimeout, KillWait and cred_expire (a requeued job's hold): the shortest that work.
SLURM_CONF = """\
ClusterName=linework
SlurmctldHost={host}({address})
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={dir}/munge.sock,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={dir}/slurmctld.pid
SlurmctldLogFile={dir}/slurmctld.log
StateSaveLocation={dir}/state
SlurmdPidFile={dir}/slurmd.%n.pid
SlurmdSpoolDir={dir}/spool.%n
SlurmdLogFile={dir}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=6
KillWait=5
MinJobAge=86400
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowgrace Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
# First process of a node: waits for its network cable, then becomes the power switch (killed = power cut).
NODE = """\
hostname node{k}
ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add 10.77.0.1{k}/24 dev eth0 && ip link set eth0 up
slurmd -D -N node{k} &
while :; do sleep 3600 & wait $!; done
"""
# First process of the site. The resolver refuses at once: a reverse look-up that times out costs 10 s a rank.
SITE = """\
set -e
hostname control
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/resolv.conf" /etc/resolv.conf
ip link set lo up
ip link add lw0 type bridge
ip addr add 10.77.0.1/24 dev lw0
ip link set lw0 up
touch "$1/up"
while :; do sleep 3600 & wait $!; done
"""
NAMESPACES = [
    "unshare",
    "--mount",
    "--uts",
    "--pid",
    "--net",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "--propagation",
    "private",
    "bash",
    "-c",
]


class Cluster:
    """Brings the site up when made; `stop` ends it. Commands run on its login node through `run`."""

    def __init__(self, isolated: bool = True) -> None:
        remove_leftovers()
        # Not under tmp_path: the paths of the unix sockets in here must stay under 108 characters.
        self.dir = Path(tempfile.mkdtemp(prefix="lw-", dir="/tmp"))
        (self.dir / "session").write_text(str(os.getpid()))
        self.env = clean_environment() | {"SLURM_CONF": str(self.dir / "slurm.conf")}
        self.nodes: dict[int, subprocess.Popen] = {}  # what holds node k's processes
        self.boots = itertools.count(1)
        self.cables: dict[int, str] = {}  # the site's end of node k's network cable
        self.site = self._start_site() if isolated else None
        try:
            self._write_conf()
            self._start_daemons()
        except BaseException:
            self.stop()
            raise

    def _start_site(self) -> subprocess.Popen | None:
        """Starts the site's namespaces; None where this machine doesn't allow them."""
        (self.dir / "hosts").write_text(
            "127.0.0.1 localhost\n10.77.0.1 control\n" + "".join(f"10.77.0.1{k} node{k}\n" for k in NODES)
        )
        (self.dir / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        site = start(["setpriv", "--pdeathsig", "KILL", *NAMESPACES, SITE, "site", self.dir], self.env)
        while not (self.dir / "up").exists():
            if site.poll() is not None:
                return None
            time.sleep(0.01)
        return site

    def _write_conf(self) -> None:
        """slurm.conf and what it needs beside it. Without namespaces the nodes differ by their port only."""
        d = self.dir
        if self.site:
            host, address, ports = "control", "10.77.0.1", [6817, 6818, 6818]
            place = "NodeHostname=node{k} NodeAddr=10.77.0.1{k}"
        else:
            host, address, ports = socket.gethostname().split(".")[0], "127.0.0.1", free_ports(3)
            place = f"NodeHostname={host} NodeAddr={address}"
        has = f"CPUs={CPUS} RealMemory=100000 Gres=gpu:{GPUS}"
        nodes = [f"NodeName=node{k} {place.format(k=k)} Port={ports[k]} {has}" for k in NODES]
        (d / "slurm.conf").write_text(
            SLURM_CONF.format(
                dir=d,
                host=host,
                address=address,
                port=ports[0],
                user=getpass.getuser(),
                nodes="\n".join(nodes),
            )
        )
        for g in range(GPUS):
            (d / f"gpu{g}").symlink_to("/dev/null")
        (d / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={d}/gpu[0-{GPUS - 1}]\n")
        # slurmd starts a cgroup plugin even when nothing uses it; letting it find one fails in containers.
        (d / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")

    def _start_daemons(self) -> None:
        d = self.dir
        d.chmod(0o755)
        (d / "munge").mkdir(mode=0o700)
        (d / "state").mkdir()
        (d / "munge" / "key").write_bytes(os.urandom(128))
        (d / "munge" / "key").chmod(0o400)
        files = [f"--{name}-file={d}/munge/{name}" for name in ("key", "pid", "log", "seed")]
        self.run("munged", f"--socket={d}/munge.sock", *files)
        self.run("slurmctld", "-c", "-f", d / "slurm.conf")
        for k in NODES:
            self.boot(k)
        self.settle()

    def stop(self) -> None:
        """Ends everything by pid and removes the folder."""
        for process in [*self.nodes.values(), *([self.site] if self.site else [])]:
            process.kill()  # unshare --kill-child: the first process goes with it, and all others with that
            process.wait()
        end_processes(self.dir)
        shutil.rmtree(self.dir, ignore_errors=True)

    # -- commands

    def command(self, *command: object, cwd: Path | None = None) -> list[str]:
        """The argv that runs `command` on the login node."""
        argv = [str(part) for part in command]
        if not self.site:
            return argv
        # env --chdir: the folder one is in when entering a namespace has no path inside it.
        enter = [f"--target={first_child(self.site.pid)}", "--mount", "--uts", "--net", "--pid"]
        return ["nsenter", *enter, "env", f"--chdir={cwd or Path.cwd()}", *argv]

    def call(
        self,
        *command: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 90,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node; the caller looks at its return code."""
        argv = self.command(*command, cwd=cwd)
        env = self.env | (env or {})
        return subprocess.run(argv, cwd=cwd, env=env, text=True, capture_output=True, timeout=timeout)

    def run(self, *command: object, **options: Any) -> str:
        """Runs a command that must succeed; returns its standard output."""
        done = self.call(*command, **options)
        assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    # -- jobs

    def sbatch(self, *arguments: object, **options: Any) -> str:
        """Submits a job; returns its id."""
        return self.run("sbatch", "--parsable", *arguments, **options).strip()

    def state(self, job: str) -> str:
        return self.run("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip()

    def show(self, job: str) -> dict[str, str]:
        """All that slurmctld knows about the job."""
        fields = self.run("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait(self, job: str, *wanted: str, timeout: float = 120) -> str:
        """Waits until the job is in a wanted state, by default any final one."""
        seen: list[str] = []

        def there() -> bool:
            state = self.state(job)
            seen.extend([state] if seen[-1:] != [state] else [])
            assert state in wanted or state not in FINAL_STATES or not wanted, (
                f"job {job}: {seen}, wanted {wanted}"
            )
            return state in (wanted or FINAL_STATES)

        self.wait_for(there, timeout, lambda: f"job {job}: {seen}, wanted {wanted}: {self.show(job)}")
        return seen[-1]

    def settle(self, timeout: float = 60) -> None:
        """Cancels every job and waits until both nodes are idle."""
        jobs = self.call("squeue", "-h", "-o", "%A").stdout.split()
        if jobs:
            self.call("scancel", *jobs)
        self.wait_for(self.idle, timeout, lambda: self.run("squeue") + self.run("sinfo", "-NR"))

    def idle(self) -> bool:
        """No job, and no node at work or out of order."""
        nodes = self.call("sinfo", "-hNp", "main", "-o", "%T").stdout.split()
        return nodes == ["idle"] * len(NODES) and not self.run("squeue", "-h")

    @staticmethod
    def wait_for(
        there: Callable[[], bool], timeout: float = 60, what: Callable[[], str] = lambda: ""
    ) -> None:
        """Polls until `there`; says `what` is wrong when it does not come about."""
        end = time.monotonic() + timeout
        while not there():
            assert time.monotonic() < end, f"not in {timeout} s: {what()}"
            time.sleep(0.05)

    # -- nodes

    def boot(self, k: int) -> None:
        """Powers node k on."""
        if not self.site:
            self.nodes[k] = start(["slurmd", "-D", "-N", f"node{k}"], self.env)
            return
        self.nodes[k] = start(self.command(*NAMESPACES, NODE.format(k=k)), self.env)
        link = f"lw{next(self.boots)}"  # a new name: the kernel takes its time to remove a dead node's
        self.link("add", link, "type", "veth", "peer", "name", "eth0", "netns", str(self.node_pid(k)))
        self.link("set", link, "master", "lw0", "up")
        self.cables[k] = link

    def link(self, *words: str) -> None:
        """`ip link` in the network of the site."""
        assert self.site, "no namespaces here: both nodes have the machine's network"
        network = f"--net=/proc/{first_child(self.site.pid)}/ns/net"
        subprocess.run(["nsenter", network, "ip", "link", *words], check=True)

    def cable(self, k: int, state: str) -> None:
        """state: down cuts node k off without a word to anybody, up heals that."""
        self.link("set", self.cables[k], state)

    def on_node(self, k: int, *command: object) -> list[str]:
        """The argv that runs `command` on node k, as its administrator would."""
        argv = [str(part) for part in command]
        if not self.site:
            return argv
        return ["nsenter", f"--target={self.node_pid(k)}", "--mount", "--uts", "--net", "--pid", *argv]

    def small_disk(self, k: int, folder: Path, size: str) -> Path:
        """Puts a disk of that size at `folder` on node k; the path under which it is seen from here."""
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            self.on_node(k, "mount", "-t", "tmpfs", "-o", f"size={size}", "disk", folder), check=True
        )
        return Path(f"/proc/{self.node_pid(k)}/root{folder}") if self.site else folder

    def kill_slurmd(self, k: int) -> None:
        """The node's daemon ends at once, its jobs live on."""
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[:4] == [b"slurmd", b"-D", b"-N", f"node{k}".encode()] and belongs(process, self.dir):
                    os.kill(int(process.name), signal.SIGKILL)

    def start_slurmd(self, k: int) -> None:
        daemon = start(self.on_node(k, "slurmd", "-D", "-N", f"node{k}"), self.env)
        if not self.site:
            self.nodes[k] = daemon

    def ranks(self, job: str) -> dict[int, int]:
        """This machine's pid of each rank of the job's running step, without their children."""
        steps: dict[int, tuple[int, int]] = {}  # pid -> rank, parent
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, KeyError):
                text = (process / "environ").read_bytes().decode(errors="replace")
                env = dict(word.split("=", 1) for word in text.split("\0") if "=" in word)
                if belongs(process, self.dir) and env["SLURM_JOB_ID"] == job and "SLURM_STEP_ID" in env:
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    steps[int(process.name)] = (int(env["SLURM_PROCID"]), parent)
        return {rank: pid for pid, (rank, parent) in steps.items() if parent not in steps}

    def node_pid(self, k: int) -> int:
        """This machine's pid of node k's first process: nsenter started unshare, which started it."""
        return first_child(first_child(self.nodes[k].pid))

    def power_cut(self, k: int) -> None:
        """Every process of node k ends at once."""
        os.kill(self.node_pid(k), signal.SIGKILL)
        self.nodes.pop(k).wait()


def start(command: list, env: dict[str, str]) -> subprocess.Popen:
    """Starts a process that talks to nobody."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen([str(part) for part in command], env=env, stdin=quiet, stdout=quiet, stderr=quiet)


def clean_environment() -> dict[str, str]:
    """The environment without what a job or a site left in it, with Slurm's daemons on the PATH."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH_", "SRUN_"))}
    return kept | {"PATH": f"{kept['PATH']}:/usr/sbin:/sbin"}


def first_child(pid: int) -> int:
    """The pid of a process's first child, waited for."""
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if children:
            return int(children[0])
        time.sleep(0.01)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def end_processes(folder: Path) -> None:
    """Kills what was started with this site's slurm.conf: daemons, and jobs that outlived them."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if belongs(process, folder):
                os.kill(int(process.name), signal.SIGKILL)


def belongs(process: Path, folder: Path) -> bool:
    """Whether /proc/PID was started with the slurm.conf of this site."""
    return f"SLURM_CONF={folder}/slurm.conf".encode() in (process / "environ").read_bytes().split(b"\0")


def remove_leftovers() -> None:
    """Removes the folders of sites whose test session is gone."""
    for folder in Path("/tmp").glob("lw-*"):
        with contextlib.suppress(OSError, ValueError):
            if not Path("/proc", (folder / "session").read_text()).exists():
                end_processes(folder)
                shutil.rmtree(folder, ignore_errors=True)
