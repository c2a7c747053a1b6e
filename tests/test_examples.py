"""The scripts in examples/."""

import os
import subprocess
import sys
from pathlib import Path

from tests.documentation import ROOT


def test_show_says_that_it_loads_before_it_imports_for_seconds(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "tiny" / "show.py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "")
    assert done.stderr.startswith("loading")
