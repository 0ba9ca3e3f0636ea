"""Telling how far a running step has come: a thread that waits for the device's events, in their order.

The engine thread only records events between launches; it never waits for the device.
"""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from biphase.engine.gpu.accelerator import Accelerator, Event

_log = logging.getLogger(__name__)


class LayerWatch:
    """Made and called in the engine thread; its own thread starts with the first step that is followed."""

    def __init__(self) -> None:
        self._events: SimpleQueue[tuple[Event | None, Callable[[], None]]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def follow(self, told: Callable[[int], None], accelerator: Accelerator) -> Callable[[int], None]:
        """What the forward pass calls with a number of layers: ``told`` hears of it when their work is over."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="layers", daemon=True)
            self._thread.start()
        return lambda num_layers: self._events.put((accelerator.record(), lambda: told(num_layers)))

    def last(self) -> threading.Event:
        """Set when all that was put before has been told."""
        done = threading.Event()
        self._events.put((None, done.set))
        return done

    def _run(self) -> None:
        while True:
            event, call = self._events.get()
            try:
                if event is not None:
                    event.wait()
                call()
            except Exception:  # noqa: BLE001 - of a failed device whoever waits for the step hears; the thread lives on
                _log.exception("nobody was told of a step's layers")
