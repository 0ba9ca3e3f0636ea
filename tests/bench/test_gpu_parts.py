"""What the parts of scripts/gpu_check.sh run, seen without a GPU and without running it."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gpu_parts
import pytest
from gpu_parts import PARTS, TOTAL_S, chunks_of, engine_part, kernels_part, node_ids
from gpu_run import CUT, ROOT, Check

DOCUMENT: dict[str, Any] = {"columns": ["kernel"], "rows": [["x"]], "goals": []}


class Recorded(Check):
    """Benches and commands answer from a list."""

    def __init__(self, out: Path, answers: list[Any]) -> None:
        super().__init__(out, seconds=500, environment=os.environ, capability=90)
        self.asked: list[tuple[str, ...]] = []
        self.environments: list[Mapping[str, str]] = []
        self._answers = iter(answers)

    def bench(self, name: str, *arguments: str, **options: Any) -> tuple[int, dict[str, Any], list[str]]:
        self.asked.append((name, *arguments))
        self.environments.append(options.get("environment") or {})
        answer: tuple[int, dict[str, Any], list[str]] = next(self._answers)
        return answer

    def run(self, command: Any, **options: Any) -> tuple[int, str]:
        self.asked.append(tuple(command))
        answer: tuple[int, str] = next(self._answers)
        return answer


def test_the_parts_end_well_within_nine_minutes() -> None:
    assert sum(part.limit_s for part in PARTS.values()) + 15 <= TOTAL_S <= 525
    assert list(PARTS) == ["compile", "tests", "kernels", "engine", "pair"]


def test_test_files_exist_and_none_that_launches_kernels_is_forgotten() -> None:

    assert all((ROOT / name).exists() for name in gpu_parts._TESTS)
    of_the_host = {"check", "dependent_launch", "interpreter_patch", "mutations", "sample_noise", "tuning"}
    there = {path.stem.removeprefix("test_") for path in (ROOT / "tests/kernels/on_triton").glob("test_*.py")}
    assert there - of_the_host == {Path(name).stem.removeprefix("test_") for name in gpu_parts._TESTS} - {
        "gpu_engine",
        "gpu_planes",
    }


def test_tests_are_run_in_chunks_of_one_file() -> None:
    collected = (
        "tests/a.py::one\ntests/a.py::two[x - y]\ntests/a.py::three\ntests/b.py::one\n\n4 tests collected in 1s\n"
    )
    nodes = node_ids(collected)
    assert len(nodes) == 4
    assert chunks_of(nodes, 2) == [nodes[:2], nodes[2:3], nodes[3:]]
    assert chunks_of([]) == []


def test_failed_tests_are_named_and_all_output_is_kept(tmp_path: Path) -> None:
    collected = (0, "\n".join(f"tests/kernels/on_triton/test_moe.py::test_{i}" for i in range(17)))
    failed = (
        1,
        "...\nFAILED tests/kernels/on_triton/test_moe.py::test_3 - assert 1 == 2\n1 failed, 15 passed in 3.00s",
    )
    check = Recorded(tmp_path, [collected, failed, failed])
    outcome = gpu_parts.tests_part(check)
    assert not outcome.ok and len(check.asked) == 3
    assert outcome.lines[:2] == [
        "- test_moe, 16 tests: 1 failed, 15 passed in 3.00s",
        "  - FAILED tests/kernels/on_triton/test_moe.py::test_3 - assert 1 == 2",
    ]
    assert (tmp_path / "tests.txt").read_text().count("== tests/kernels/on_triton/test_moe.py: exit code 1") == 2


def test_no_tests_is_a_failure(tmp_path: Path) -> None:
    outcome = gpu_parts.tests_part(Recorded(tmp_path, [(2, "ImportError: no torch")]))
    assert not outcome.ok and "ImportError: no torch" in outcome.lines
    assert (tmp_path / "tests.txt").read_text() == "ImportError: no torch"


@pytest.mark.parametrize(
    ("code", "left", "expected"),
    [
        (1, ["experts", "sample"], ("kernels.py", "--only", "experts", "sample")),  # it ended, the device was lost
        (-11, ["experts", "sample"], ("kernels.py", "--only", "sample")),  # it died in the first of them
    ],
)
def test_another_process_measures_what_a_lost_one_had_left(
    tmp_path: Path, code: int, left: list[str], expected: tuple[str, ...]
) -> None:
    check = Recorded(tmp_path, [(code, DOCUMENT | {"left": left}, ["lost"]), (0, DOCUMENT | {"left": []}, [])])
    outcome = kernels_part(check)
    assert check.asked == [("kernels.py",), expected]
    assert not outcome.ok and outcome.lines.count("| x |") == 2


@pytest.mark.parametrize("answer", [(CUT, DOCUMENT | {"left": ["sample"]}), (1, {}), (1, DOCUMENT | {"left": []})])
def test_what_is_cut_or_just_fails_is_not_begun_again(tmp_path: Path, answer: tuple[int, dict[str, Any]]) -> None:
    check = Recorded(tmp_path, [(*answer, ["why"])])
    assert not kernels_part(check).ok and check.asked == [("kernels.py",)]
    assert (tmp_path / "kernels.json").exists()


def test_engines_are_the_whole_llama_and_a_part_of_mixtral(tmp_path: Path) -> None:
    check = Recorded(tmp_path, [(0, DOCUMENT, [])] * 3)
    assert engine_part(check).ok
    assert [asked[1:3] for asked in check.asked] == [
        (),
        ("--model", "bench/configs/mixtral-8x7b.json"),
        ("--only", "decode"),
    ]
    assert check.asked[1][3:5] == ("--num-layers", "4")
    assert check.environments == [{}, {}, {"BIPHASE_PDL": "1"}]
