"""Announcements: replaced whole, read back as they were."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from biphase.protos.process import Announcement, Announcer, announce_to_file, set_up_logging

FIRST = Announcement(name="prefill-0", kind="prefill", incarnation=3, pid=11)


def test_json_round_trip() -> None:
    assert Announcement.from_json(FIRST.to_json()) == FIRST


@pytest.mark.parametrize("text", ["", "{}", '{"name": "a", "kind": "b", "incarnation": 1, "pid": 2, "mood": "good"}'])
def test_what_is_no_announcement_is_refused(text: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        Announcement.from_json(text)


def test_each_change_replaces_the_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "run" / "prefill-0.json"
    announcer = Announcer(FIRST, announce_to_file(path))
    assert Announcement.from_json(path.read_text()) == FIRST
    announcer.update(state="ready", address="127.0.0.1:9")
    again = Announcement.from_json(path.read_text())
    assert (again.state, again.address, again.pid) == ("ready", "127.0.0.1:9", 11)
    assert list(path.parent.iterdir()) == [path]


def test_a_process_has_one_log_file(tmp_path: Path) -> None:
    root = logging.getLogger("biphase")
    before = (root.handlers[:], root.level, root.propagate)
    try:
        set_up_logging(tmp_path / "logs" / "a.log")
        set_up_logging(tmp_path / "logs" / "b.log")
        logging.getLogger("biphase.engine").info("request r-1 took %d ms", 5)
        assert (tmp_path / "logs" / "a.log").read_text() == ""
        assert "INFO biphase.engine request r-1 took 5 ms" in (tmp_path / "logs" / "b.log").read_text()
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers[:], root.level, root.propagate = before


def test_a_process_that_leaves_has_written_all_and_waits_for_nothing(tmp_path: Path) -> None:
    script = """
import atexit, logging, sys, threading, time
from pathlib import Path
from biphase.protos.process import leave, set_up_logging
set_up_logging(Path(sys.argv[1]))
logging.getLogger("biphase").info("closed")
print("said", end="")
atexit.register(print, "taken apart")
threading.Thread(target=time.sleep, args=(60,)).start()
leave(3)
"""
    log = tmp_path / "a.log"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(log)], check=False, capture_output=True, text=True, timeout=30
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "said", "")
    assert log.read_text().endswith("closed\n")
