"""The tuning table and the script that writes it: who is asked in which order, what is measured, that defaults are fresh."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from biphase.kernels.gpu import tuning
from biphase.kernels.gpu.target import AOT_TARGETS, INTERPRETER, target_of

_ROOT = Path(__file__).resolve().parents[3]


def _load(path: Path) -> ModuleType:
    if str(_ROOT / "bench") not in sys.path:
        sys.path.append(str(_ROOT / "bench"))
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return _load(_ROOT / "scripts/tune_kernels.py")


def test_entries_called_defaults_are_what_the_ops_now_choose(script: ModuleType, tmp_path: Path) -> None:
    """Where one has changed: python scripts/tune_kernels.py --defaults"""
    table = json.loads(tuning.TABLE.read_text())
    fresh = tmp_path / "table.json"
    script.write_defaults(fresh, list(script.tuned_ops().values()))
    expected = json.loads(fresh.read_text())
    for device in expected["settings"]:
        for op, how in expected["measured"][device].items():
            assert table["measured"][device][op] == how
            assert table["settings"][device][op] == expected["settings"][device][op], (
                test_entries_called_defaults_are_what_the_ops_now_choose.__doc__
            )
    assert table["settings"].keys() == table["measured"].keys()


@pytest.mark.parametrize("op", ["rms_norm", "silu_mul", "rope_and_cache", "prefill_attention", "decode_attention"])
def test_candidates_set_what_defaults_set(script: ModuleType, op: str) -> None:
    tuned_op = script.tuned_ops()[op]
    for target in AOT_TARGETS.values():
        for key in script.variant_keys(tuned_op, target):
            names = tuned_op.default(target, key).keys()
            assert all(settings.keys() == names for settings in tuned_op.candidates(target, key))


def test_every_workload_runs_and_asks_for_its_op(script: ModuleType, device: torch.device) -> None:
    found = script.workloads(device, target_of(device).capability, small=True)
    assert {case.op for case in found} == script.tuned_ops().keys()
    for case in found:
        keys: set[str] = set()
        with script.recording(case.op, keys):
            case.make()()
        assert len(keys) == 1, case


def test_the_best_candidate_wins_over_noise_and_failures(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    op = script.tuned_ops()["rms_norm"]
    default = op.default(INTERPRETER, "F4096")
    took = {1: 0.995, 2: 1.5, 4: None, 16: 0.5, 32: 0.7}

    def times(_op: Any, _key: str, settings: dict[str, int], _users: Any) -> list[float]:
        factor = 1.0 if settings == default else took[settings["num_warps"]]
        if factor is None:
            raise RuntimeError("out of registers")
        return [10 * factor, 900 * factor]

    monkeypatch.setattr(script, "times", times)
    best, how = script.measure(op, INTERPRETER, "F4096", [], 60)
    assert (best, how) == ({"num_warps": 16}, "measured: 5 of 6 candidates")
    took[16] = took[32] = 2.0
    assert script.measure(op, INTERPRETER, "F4096", [], 60)[0] == default


def test_the_gpus_own_entry_goes_before_its_architectures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: ModuleType
) -> None:
    path = tmp_path / "table.json"
    script.put(path, "sm_90", "op", {"a": {"x": 1}, "b": {"x": 1}}, script.NOT_MEASURED)
    script.put(path, "H100", "op", {"a": {"x": 2}}, "measured: 2 of 2 candidates")
    monkeypatch.setattr(tuning, "TABLE", path)
    tuning.table.cache_clear()
    tuning._from_table.cache_clear()
    try:
        asked = [tuning.tuned("op", AOT_TARGETS[90], key) for key in "abc"]
        assert asked == [{"x": 2}, {"x": 1}, None]
        assert tuning.tuned("op", AOT_TARGETS[100], "a") is None
        assert tuning.tuned("op", INTERPRETER, "a") is None
    finally:
        tuning.table.cache_clear()
        tuning._from_table.cache_clear()
    assert json.loads(path.read_text())["measured"]["H100"]["op"].startswith("measured: 2 of 2 candidates, ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure with")
def test_without_a_gpu_it_says_so(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py"])
    assert script.main() == 2
    assert capsys.readouterr().err == (
        "tune_kernels.py: no GPU here, so nothing to measure; --dry-run and --defaults need none\n"
    )
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--dry-run", "--op", "rms_norm"])
    assert script.main() == 0
    assert "F4096: 6 candidates, default {'num_warps': 8}" in capsys.readouterr().out


def test_defaults_say_what_was_written_where(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    script.put(path, "sm_90", "silu_mul", {"I7": {"BLOCK": 1, "num_warps": 1}}, script.NOT_MEASURED)
    script.put(path, "sm_90", "rms_norm", {"F4096": {"num_warps": 1}}, script.NOT_MEASURED)
    before = path.read_text()
    monkeypatch.setattr(
        sys, "argv", ["tune_kernels.py", "--defaults", "--op", "rms_norm", "silu_mul", "--table", str(path)]
    )
    assert script.main() == 0
    number = len(script.entries(path))
    assert capsys.readouterr().out == (
        f"wrote {path}: {number} entries, of which 1 changed and {number - 1} are new; 1 removed\n"
    )
    assert path.read_text() != before
    assert script.main() == 0
    assert "of which 0 changed and 0 are new; 0 removed" in capsys.readouterr().out


def test_an_op_without_settings_is_refused_in_a_line(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--op", "rms_norm", "embed"])
    assert script.main() == 2
    said = capsys.readouterr().err
    assert "under the name embed, and ops without settings are not tuned; tuned are: decode_attention, " in said
    assert len(said.splitlines()) == 1
