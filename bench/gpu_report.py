"""A GPU bench's report: its groups one by one, each written when it ends, so that one which fails or is cut short takes
nothing else with it."""

import argparse
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import report
import torch


@dataclass
class GpuReport(report.Report):
    """JSON has ``failed`` (group: error, one line) and ``left``, the groups not run: the one under way is the first."""

    failed: dict[str, str] = field(default_factory=dict)

    def run_groups(self, groups: dict[str, Callable[[], object]], arguments: argparse.Namespace) -> None:
        """Stops where the device is lost; what is left then needs another process."""
        self.extra["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        self.extra["failed"] = self.failed
        left = list(groups)
        for name, run in groups.items():
            self.extra["left"] = left.copy()
            self.write(arguments)
            try:
                run()
            except Exception as error:  # noqa: BLE001 -- a row of the report; the others go on
                traceback.print_exc()
                self.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            left.remove(name)
            if not device_is_well():
                print(f"the device is lost after {name}; left: {', '.join(left) or 'nothing'}", file=sys.stderr)
                break
        self.extra["left"] = left

    def finish(self, arguments: argparse.Namespace) -> int:
        status = super().finish(arguments)
        for name, error in self.failed.items():
            print(f"FAILED {name}: {error}", flush=True)
        return 1 if self.failed or self.extra.get("left") else status


def device_is_well() -> bool:
    """False after an error that ends all use of the GPU in this process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
