"""scripts/gpu_check.sh as it is typed, in a Python that lacks what a bare GPU machine lacks; and its installing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest

ROOT = Path(__file__).resolve().parents[2]


def check(environment: dict[str, str], *arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/gpu_check.sh", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment | {"PYTHON": sys.executable},
    )


def test_help_lists_the_parts_and_their_limits(bare: dict[str, str]) -> None:
    done = check(bare, "--help")
    assert done.returncode == 0
    for word in ("compile: at most", "tests: at most", "kernels: at most", "engine: at most", "pair: at most"):
        assert word in " ".join(done.stdout.split())


def test_an_unknown_part_is_refused_in_a_line(bare: dict[str, str]) -> None:
    done = check(bare, "--only", "kernel")
    assert done.returncode == 2
    assert "invalid choice: 'kernel'" in done.stderr.splitlines()[-1]


def test_what_the_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "gpu_check: this machine lacks the Python package no_such_package\n"


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(
        gpu_check, "probe", lambda: {"torch": "2.11.0", "triton": "3.6.0", "device": "", "capability": 0}
    )
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert capsys.readouterr().err == "gpu_check: torch 2.11.0 finds no CUDA GPU here (--smoke needs none)\n"


def test_one_part_in_a_bare_python(bare: dict[str, str], tmp_path: Path) -> None:
    done = check(bare, "--smoke", "--only", "compile", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("smoke: tiny shapes, on the CPU: the figures mean nothing\n")
    said = (tmp_path / "out/summary.md").read_text().splitlines()
    assert said[:3] == ["# no GPU (smoke)", "", "smoke: tiny shapes, on the CPU: the figures mean nothing"]
    assert "; installed with pip; results in" in done.stdout and "compile: ok in" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["compile.json", "summary.md"]
    assert json.loads((tmp_path / "out/compile.json").read_text())["problems"] == 0
    assert "| compile | ok |" in (tmp_path / "out/summary.md").read_text()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_all_parts_in_a_bare_python_fill_six_files(bare: dict[str, str], tmp_path: Path) -> None:
    done = check(bare, "--smoke", "--out", str(tmp_path / "out"), timeout_s=800)
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["compile.json", "engine.json", "kernels.json", "pair.json", "summary.md", "tests.txt"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    text = (tmp_path / "out/summary.md").read_text()
    for line in ("| compile | ok", "| tests | ok", "| kernels | ok", "| engine | ok", "| pair | ok"):
        assert line in text
    assert "| decode attention 64 x 4k |" in text and "pair-bits-21-differences: 0 (<= 0) met" in text


@pytest.mark.parametrize("with_pip", [pytest.param(True, marks=pytest.mark.long), False])
def test_the_checkout_is_installed_or_linked(
    with_pip: bool, bare: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not with_pip:
        monkeypatch.setattr(gpu_check, "_install_with_pip", lambda site: "it has no setuptools")
    site = tmp_path / "site"
    linked = "linked, since pip did not build it here (it has no setuptools)"
    assert gpu_check.install(site) == ("installed with pip" if with_pip else linked)
    assert (site / "biphase/engine").is_symlink() != with_pip
    paths = os.pathsep.join([str(site), bare["PYTHONPATH"]])
    code = "import biphase.engine.gpu.engine as e, biphase.decode_worker.serve, biphase.kernels.gpu.tuning as t\n"
    code += "t.table(); print(e.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, env=bare | {"PYTHONPATH": paths}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))


def test_where_pip_cannot_build_it_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "checkout"
    for folder in gpu_check.folders().values():
        (broken / folder).mkdir(parents=True)
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, broken)
    text = (ROOT / "pyproject.toml").read_text()
    (broken / "pyproject.toml").write_text(text.replace("setuptools.build_meta", "setuptools.no_such_backend"))
    monkeypatch.setattr(gpu_check, "ROOT", broken)
    how = gpu_check.install(tmp_path / "site")
    assert how.startswith("linked, since pip did not build it here (")
    assert (tmp_path / "site/biphase/kernels").is_symlink()
