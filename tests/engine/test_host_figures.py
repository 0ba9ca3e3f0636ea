"""What /proc tells where psutil is missing is what psutil tells."""

from pathlib import Path

import psutil
import pytest

from biphase.engine import host_figures


@pytest.fixture
def without_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_figures, "psutil", None)


def test_proc_tells_what_psutil_tells(without_psutil: None) -> None:
    told, process = host_figures.ProcessFigures().counters(), psutil.Process()
    assert told.keys() == {"threads", "open_fds", "rss_bytes"}
    assert any(_same_threads(process) for _ in range(50))  # those of other tests may just be ending
    assert abs(told["open_fds"] - process.num_fds()) <= 1
    assert 0.8 < told["rss_bytes"] / process.memory_info().rss < 1.25
    assert 0.8 < host_figures.available_memory_bytes() / psutil.virtual_memory().available < 1.25


def _same_threads(process: psutil.Process) -> bool:
    return host_figures.ProcessFigures().counters()["threads"] == process.num_threads()


def test_a_system_without_proc_still_answers(without_psutil: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_figures, "_PROC", Path("/nowhere"))
    assert host_figures.available_memory_bytes() > 1 << 20
    assert set(host_figures.ProcessFigures().counters().values()) == {0}
