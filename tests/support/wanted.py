"""A reconciler whose instances are all up, and what they say, under a clock that the test turns."""

from biphase.cluster.reconcile import Reconciler
from biphase.cluster.slot import Wanted, Work
from biphase.protos.process import Announcement, ProcessState


def say(
    core: Reconciler, name: str, state: ProcessState, now_s: float, *, node: str = "one", incarnation: int = 0
) -> None:
    slot = core.slots[name]
    word = Announcement(
        name=name,
        kind=slot.kind,
        incarnation=incarnation or slot.incarnation,
        pid=1,
        state=state,
        address=f"{node}:1",
        node=node,
    )
    core.announced(word, now_s)


def made(prefill: int = 1, decode: int = 2, *, kill_patience_s: float | None = None) -> Reconciler:
    """All up at 0 s, each instance on a host of its own called as it is."""
    names = [Wanted(name=f"prefill-{i}", kind="prefill") for i in range(prefill)]
    names += [Wanted(name=f"decode-{i}", kind="decode") for i in range(decode)]
    core = Reconciler([*names, Wanted(name="router-0", kind="router")], 100.0, kill_patience_s)
    core.decide(0.0)
    for name in core.slots:
        up(core, name, 0.0)
    assert core.all_up
    core.decide(0.0)
    core.notes.clear()
    return core


def up(core: Reconciler, name: str, now_s: float, *, node: str = "") -> None:
    say(core, name, "ready", now_s, node=node or name)
    core.linked(name, core.slots[name].incarnation, now_s)


def idle(core: Reconciler, name: str) -> None:
    core.worked(name, core.slots[name].incarnation, Work(draining=True))
