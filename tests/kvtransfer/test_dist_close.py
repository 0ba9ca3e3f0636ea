"""How pair groups end with their process: no thread is left to take gloo apart while the interpreter leaves."""

import subprocess
import sys
import threading
import time

import pytest

from biphase.kvtransfer.pair_groups.messages import Answer, Wish
from biphase.kvtransfer.pair_groups.plane import DistPlane

_PROGRAM = """
import asyncio
from biphase.kvtransfer.pair_groups.plane import DistPlane

async def main():
    ours, theirs = (DistPlane("127.0.0.1", patience_s=10.0) for _ in range(2))
    receiver = await ours.receiver("them")
    sender = await theirs.sender(receiver.hello, "us")
    await receiver.start(sender.answer)
    room = await sender.room(100_000)
    reference = await sender.send(room)
    await receiver.fetch(reference, 100_000)
    receiver.done(reference)
    await ours.close()
    await theirs.close()

asyncio.run(main())
"""


def test_a_process_that_used_pair_groups_leaves_in_good_order() -> None:
    for _ in range(3):
        ended = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def pair_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("pair ")]


async def test_groups_whose_other_end_never_comes_end_at_once() -> None:
    plane, other = DistPlane("127.0.0.1"), DistPlane("127.0.0.1", patience_s=0.0)
    wish = Wish(reader="nobody", life=0, last=0, backend="gloo")
    await plane.sender(wish.packed(), "nobody")
    receiver = await other.receiver("them")
    with pytest.raises(ConnectionError, match="still being built"):
        await receiver.start(Answer(store=plane.store, pair="k", pull=1, standing=b"").packed())
    assert len(pair_threads()) == 2
    began_s = time.monotonic()
    await other.close()
    await plane.close()
    assert time.monotonic() - began_s < 1.0
    assert pair_threads() == []
