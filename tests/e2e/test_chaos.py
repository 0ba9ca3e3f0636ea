"""Two minutes of faults at random under load: what is promised holds, and all comes back.

A small random model, so that what is measured on two cores is recovery and not the loading of weights; `scripts/chaos.sh` has
the packaged one.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import netns
from support.dummy_directory import write_tokenizer
from support.random_llama import VOCAB, write_random_llama

LACKING = netns.lacking()
BENCH = Path(__file__).resolve().parents[2] / "bench"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(420),
    pytest.mark.skipif(bool(LACKING), reason=f"needs hosts of its own: {LACKING}"),
]


def test_two_minutes_of_faults(tmp_path: Path) -> None:
    model, recorded, out = tmp_path / "llama", tmp_path / "recorded.jsonl", tmp_path / "chaos.json"
    write_random_llama(model)
    write_tokenizer(model, VOCAB)
    recorder = [sys.executable, str(BENCH / "record_tokens.py"), "--model", str(model), "--out", str(recorded)]
    subprocess.run([*recorder, "--prompts", "48", "--output-len", "64"], check=True, capture_output=True, timeout=120)
    flags = ["--model", str(model), "--tokens", str(recorded), "--kv-memory", "64MiB", "--minutes", "2", "--seed", "1"]
    chaos = subprocess.Popen(
        [sys.executable, str(BENCH / "chaos.py"), *flags, "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, errors = chaos.communicate(timeout=380)
    finally:
        chaos.kill()
    assert chaos.returncode == 0, errors[-8000:]
    found = json.loads(out.read_text())
    assert [goal for goal in found["goals"] if not goal["met"]] == [], (found["rows"], errors[-8000:])
    assert len(found["faults"]) >= 10  # of 11
    assert [name for name in netns.names() if name.startswith(f"bp{chaos.pid}-")] == []
