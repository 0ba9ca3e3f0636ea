"""Whether and when a controller that has ended is started again. Pure: no clock, no processes."""

from dataclasses import KW_ONLY, dataclass

from biphase.protos.errors import SetupError

BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0)
STABLE_S = 10.0
"""A controller that lived this long is started again at once."""


@dataclass(slots=True)
class ControllerLives:
    """The controllers of one supervisor, one after the other. ``incarnation``: of the present one."""

    incarnation: int
    _: KW_ONLY
    may_fail: bool
    """A set-up that cannot work ends the deployment: nothing serves yet."""
    _failures: int = 0

    def ended(self, *, lived_s: float, was_up: bool, failed: str) -> float:
        """Seconds until the next one starts. ``failed``: why its set-up did not work, empty where it ended otherwise.

        Raises SetupError where that ends the deployment: of the very first one, and where a controller that was up has
        judged that the deployment cannot be brought up.
        """
        if failed and (was_up or self.may_fail):
            raise SetupError(failed)
        self._failures = self._failures + 1 if lived_s < STABLE_S else 0
        self.incarnation += 1
        self.may_fail = False
        return BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)]
