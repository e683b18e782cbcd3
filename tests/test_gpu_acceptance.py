"""`make gpu`, rehearsed on the CPU: each section says its lines, and none of them FAIL."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_acceptance_run_rehearsed_on_the_cpu():
    command = [sys.executable, "benchmarks/gpu_acceptance.py", "--tiny", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 failed"
    assert {line.split()[0] for line in lines[:-1]} == {"PASS", "FIGURE"}
    for claim in (
        "killed and resumed: sha256",
        "stopped by USR2 and resumed: sha256",
        "detections of the CPU on cpu: ",
        "SIGSTOP: the same command goes on",
        "all_reduce of 4 MB over 2 ranks: ",
    ):
        assert any(claim in line for line in lines), claim
