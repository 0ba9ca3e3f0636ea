"""What is installed: every folder with code, nothing else."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support.sources import Sources


def test_every_folder_with_code_is_a_listed_package(sources: Sources) -> None:
    found = {
        "biphase." + ".".join(path.parent.relative_to(sources.root).parts)
        for folder in sources.folders
        for path in sources.modules(folder)
    }
    assert sorted(sources.pyproject["tool"]["setuptools"]["packages"]) == sorted(found)


def test_each_top_folder_maps_to_its_own_name(sources: Sources) -> None:
    mapping = sources.pyproject["tool"]["setuptools"]["package-dir"]
    assert mapping == {f"biphase.{folder}": folder for folder in sources.folders}


def test_the_namespace_has_no_module_of_its_own(sources: Sources) -> None:
    assert not (sources.root / "__init__.py").exists()


def test_kernels_is_no_regular_package(sources: Sources) -> None:
    """Ray puts the working directory on its workers' path; a regular package would hide Hugging Face's kernels there."""
    assert not (sources.root / "kernels" / "__init__.py").exists()


def test_every_folder_says_that_it_is_typed(sources: Sources) -> None:
    assert [folder for folder in sources.folders if not (sources.root / folder / "py.typed").is_file()] == []


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory, sources: Sources) -> list[str]:
    """The names inside a wheel built from a copy of the sources, so that no older build's leavings get in."""
    base = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(sources.root, base / "sources", ignore=ignore)
    build = "import sys, setuptools.build_meta as backend; backend.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(base)],
        cwd=base / "sources",
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = base.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel_holds_biphase_and_nothing_else(wheel_names: list[str], sources: Sources) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    version = sources.pyproject["project"]["version"]
    assert tops == {"biphase", f"biphase-{version}.dist-info"}
    assert {name.split("/")[1] for name in wheel_names if name.startswith("biphase/")} == set(sources.folders)


def test_wheel_holds_every_module_and_the_data_beside_it(wheel_names: list[str], sources: Sources) -> None:
    suffixes = {".py", ".pyi", ".proto", ".typed", ".json"}
    wanted = {
        str(Path("biphase") / path.relative_to(sources.root))
        for folder in sources.folders
        for path in (sources.root / folder).rglob("*")
        if path.suffix in suffixes
    }
    assert wanted - set(wheel_names) == set()
    assert {name for name in wheel_names if name.startswith("biphase/")} - wanted == set()


def test_wheel_carries_the_licence(wheel_names: list[str]) -> None:
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel_names)


def test_no_symbolic_link_is_tracked(sources: Sources) -> None:
    """A link may lead out of the clone, to a place that only one machine has."""
    if not (sources.root / ".git").exists():
        pytest.skip("the sources are no clone")
    listing = subprocess.run(["git", "ls-files", "-s"], cwd=sources.root, check=True, capture_output=True, text=True)
    assert [line for line in listing.stdout.splitlines() if line.startswith("120000 ")] == []
