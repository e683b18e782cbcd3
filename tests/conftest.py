"""What several test files share: the two-node Slurm of the session, eight sheets."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, clean_environment

# For torch in every process that tests start, unless it is told otherwise: two tests run at a time.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def site() -> Iterator[Cluster]:
    """The running cluster; without Slurm on this machine its tests are skipped, unless that is forbidden."""
    path = clean_environment()["PATH"]
    daemons = ("munged", "slurmctld", "slurmd")
    missing = [name for name in daemons if not shutil.which(name, path=path)]
    if missing:
        reason = f"no {', '.join(missing)} here: apt-get install -y slurm-wlm munge iproute2"
        if os.environ.get("LINEWORK_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    cluster = Cluster()
    yield cluster
    cluster.stop()


@pytest.fixture
def slurm(site: Cluster) -> Iterator[Cluster]:
    """The cluster, idle before and after the test."""
    yield site
    site.settle()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: small networks are no slower, and other processes are left alone."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sheets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn sheets of 256 px: eight in train/, four each in valid/ and test/, eight in unlabeled/."""
    folder = tmp_path_factory.mktemp("sheets") / "drawn"
    flags = ["--out", str(folder), "--sheets", "8", "--unlabeled", "8", "--size", "256", "256"]
    subprocess.run([sys.executable, "-m", "schematics.synthetic", *flags], check=True, capture_output=True)
    return folder
