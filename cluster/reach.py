"""Whether silence says something of the instances or of the controller's own host. Pure: times and answers come in.

A host that is cut off sees the links to all others break, as if all of them had died at once. So before an instance is given
up for its silence every other host is asked; where none of several answers, it is this one that is cut off. Of a single
other host that cannot be told: its silence is its own, also where it is what is left of several. A controller that did not
run for a while heard nobody either.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MIN_OTHERS = 2
AGAIN_S = 3.0
"""How long a silent instance may take to answer once this host reaches another again."""
PAUSE_S = 3.0
"""A controller that was not awake for so long was stopped or starved itself, and could hear nobody."""
CUT_OFF = "this host reaches no other: nobody is given up"


@dataclass(slots=True)
class Reach:
    """Owned by the Reconciler. Other hosts are those with instances or routers; the controller's own is none of them."""

    cut_off_since_s: float | None = None
    again_s: float | None = None
    """When the last cut ended."""
    _awake_s: float | None = None

    @property
    def is_cut_off(self) -> bool:
        return self.cut_off_since_s is not None

    def looked(self, answered: Mapping[str, bool], now_s: float) -> None:
        """All other hosts were asked: whether each has answered. What one says of itself comes in the same way."""
        silent = len(answered) >= MIN_OTHERS and not any(answered.values())
        if silent and not self.is_cut_off:
            self.cut_off_since_s, self.again_s = now_s, None
        elif self.is_cut_off and not silent:
            self.cut_off_since_s, self.again_s = None, now_s

    def awake(self, now_s: float) -> float | None:
        """The controller runs now: since when it did not, where that was a pause; None: it did all the while."""
        last_s, self._awake_s = self._awake_s, now_s
        return last_s if last_s is not None and now_s - last_s > PAUSE_S else None

    def may_be_lost(self, now_s: float) -> bool:
        """Whether an instance on another host that is silent now may be given up; if not, it is to be asked again."""
        return not self.is_cut_off and (self.again_s is None or now_s >= self.again_s + AGAIN_S)
