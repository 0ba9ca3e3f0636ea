"""The count of compilations, which must stand still while serving, against a kernel that is told to compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_integers_that_are_specialised_are_counted(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, str(Path(__file__).with_name("compile_count_process.py"))]
    for _ in range(2):  # found in the cache on disk it counts as well: a request would wait for that too
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        specialised, one, unsealed, quiet, late = json.loads(done.stdout)
        assert specialised == [1, 1, 2, 2, 3, 3, 3]
        assert one == [4, 4, 4, 4]
        assert (unsealed, quiet, late) == (0, 0, 1)
        assert "fill was compiled while serving" in done.stderr
