"""How a rank's process ends when its instance is lost, whatever hangs in it."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, sys, threading
from biphase.engine.ranks.ending import end_process
from biphase.protos.errors import SetupError
from biphase.protos.process import Announcement, Announcer, set_up_logging
set_up_logging(None)
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
announcer = Announcer(Announcement(name="decode-0", kind="decode", incarnation=1, pid=1), lambda announcement: None)
error = {"setup": SetupError("no"), "lost": RuntimeError("rank 1 is gone")}[sys.argv[1]]
threading.Thread(target=end_process, args=(announcer, error)).start()
"""


@pytest.mark.parametrize(("why", "code"), [("setup", 2), ("lost", 1)])
def test_a_rank_ends_where_nobody_takes_what_it_says(why: str, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT, why], stderr=subprocess.PIPE) as process:
        try:
            assert process.wait(30) == code  # most of it imports
        finally:
            process.kill()
