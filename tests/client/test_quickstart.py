"""The example that the README points to, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


def test_quickstart_streams_an_answer(address: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, address], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    answer, summary = done.stdout.splitlines()
    assert answer == "Hello, world"
    assert re.fullmatch(r"\[prefill-0#1 \(pid 11\) -> decode-0#1 \(pid 12\), first token after \d+ ms\]", summary)


def test_quickstart_without_a_server_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, "127.0.0.1:1"], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "quickstart: nothing listens at 127.0.0.1:1\n")
