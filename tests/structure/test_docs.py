"""What the pages promise is there: links, snippets, deploy files, the parts of the long runs."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from support.sources import ROOT

from biphase.cluster.deploy_schema import load_deployment
from biphase.planner.policy_file import load_policy

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language in the README."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text()
    pages = [path.name for path in sorted(folder.glob("[0-9]*.md"))]
    assert [name for name in pages if f"({name})" not in index] == []


def test_the_readme_opens_with_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text().split("```")[1]
    assert re.findall(r"^scripts/\w+\.sh", first, re.MULTILINE) == ["scripts/demo.sh", "scripts/test.sh"]


def test_the_readmes_deploy_file_is_taken_as_it_is(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    (tmp_path / "deploy.yaml").write_text(block)
    assert load_deployment(tmp_path / "deploy.yaml").model == "smollm2"


def test_the_readmes_code_is_a_dozen_lines_of_python() -> None:
    (block,) = blocks("python")
    ast.parse(block)
    assert len(block.splitlines()) <= 12


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.name)
def test_example_files_are_taken_as_they_are(path: Path) -> None:
    if path.name.startswith("policy"):
        load_policy(path)
    else:
        load_deployment(path)


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "scripts").glob("*.sh"), ROOT / ".ci" / "run"]), ids=lambda path: path.name
)
def test_scripts_are_sound_and_executable(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    assert path.name == "lib.sh" or path.stat().st_mode & 0o111


def test_long_runs_list_their_parts() -> None:
    script = ROOT / "scripts" / "long.sh"
    help_text = subprocess.run([script, "--help"], check=True, capture_output=True, text=True).stdout
    parts = re.findall(r"^  (\w+)  ", help_text, re.MULTILINE)
    wrong = subprocess.run([script, "tokens", "nonsense"], check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == f"long.sh: unknown part 'nonsense'; parts: {' '.join(parts)}\n"
    programs = re.findall(r'"\$bin/python" (bench/\w+\.py)', script.read_text())
    assert [name for name in programs if not (ROOT / name).exists()] == []
