"""The short form of tests/faults/chaos.py: four faults a method, and what it writes into its page.

One undisturbed run is enough here: where the run with faults equals it, two undisturbed ones do too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("method", "workers"), [("simclr", "2"), ("vicreg", "0"), ("finetune", "2")])
def test_run_struck_by_faults_equals_the_undisturbed_one(method, workers, site, tmp_path):
    page = tmp_path / "results.md"
    old = f"### Struck by faults: {method}\n\nold figures\n\n### Another part\n\nother figures\n"
    page.write_text(f"# Results\n\nbefore\n\n<!-- chaos -->\n{old}<!-- /chaos -->\n\nafter\n")
    flags = f"--methods {method} --workers {workers} --faults 4 --undisturbed 1 --parts runs --results {page}"
    command = [sys.executable, str(ROOT / "tests" / "faults" / "chaos.py"), *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert text.startswith("# Results\n\nbefore\n\n<!-- chaos -->\n## Reliability\n")
    assert text.endswith("\n<!-- /chaos -->\n\nafter\n")
    assert "old figures" not in text and text.count("other figures") == 1
    (row,) = [line.split(" | ") for line in text.splitlines() if line.startswith(f"| {method}")]
    struck = row[3].removeprefix("4: ").split(", ")
    assert sorted(struck) == ["1 USR2", "1 flipped bit", "1 kill -9", "1 kill -9 in the write"]
    assert row[7:9] == ["-", "yes"]
