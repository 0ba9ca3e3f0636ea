"""How parts are run: one that fails, raises or is cut takes nothing else with it, and what it had found is kept."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from gpu_run import CUT, Check, Outcome, Part, num_compiled, run_parts, tables


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path, seconds=60, environment=os.environ)


def run(check: Check, parts: dict[str, Part]) -> list[Outcome]:
    return run_parts(check, parts, list(parts), title="# a GPU", cache=check.out / "triton", say=lambda line: None)


def part(work: Callable[[Check], Outcome], limit_s: float = 30.0) -> Part:
    return Part(limit_s=limit_s, run=work)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_part_that_fails_or_raises_leaves_the_others_their_results(check: Check) -> None:
    def works(check: Check) -> Outcome:
        code, output = check.run(python("print('hello'); import sys; print('error', file=sys.stderr)"))
        return Outcome(code == 0, [output])

    def fails(check: Check) -> Outcome:
        return Outcome(check.run(python("raise SystemExit(3)"))[0] == 0, ["it said why"])

    def raises(check: Check) -> Outcome:
        raise ValueError("a bug of the part")

    outcomes = run(check, {"first": part(works), "second": part(fails), "third": part(raises), "fourth": part(works)})
    assert [(o.part, o.ok, o.cut) for o in outcomes] == [
        ("first", True, False),
        ("second", False, False),
        ("third", False, False),
        ("fourth", True, False),
    ]
    text = (check.out / "summary.md").read_text()
    assert text.startswith("# a GPU\n\n| part | result | s | kernels compiled |\n| --- |")
    assert "| second | **failed** | 0 | 0 |" in text and "ValueError: a bug of the part" in text
    assert text.count("hello\nerror") == 2


def test_a_part_over_its_limit_is_cut_with_its_children(check: Check) -> None:
    marker = check.out / "alive"
    child = f"import time, pathlib; time.sleep(3); pathlib.Path({str(marker)!r}).touch()"
    parent = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    said: list[tuple[int, str]] = []

    def slow(check: Check) -> Outcome:
        said.append(check.run(python(parent)))
        return Outcome(False)

    began_s = time.monotonic()
    outcomes = run(check, {"slow": part(slow, 2.0), "next": part(lambda check: Outcome(True, ["done"]))})
    assert time.monotonic() - began_s < 3
    assert said[0][0] == CUT and said[0][1].startswith("began\n") and "stopped after 2 s" in said[0][1]
    assert [outcome.result for outcome in outcomes] == ["**failed**, cut at its limit", "ok"]
    assert "| slow | **failed**, cut at its limit | 2 |" in (check.out / "summary.md").read_text()
    time.sleep(max(0.0, began_s + 3.3 - time.monotonic()))
    assert not marker.exists()


def test_time_that_is_left_over_goes_to_the_next_part_and_none_is_made_up(check: Check) -> None:
    left: list[float] = []

    def look(check: Check) -> Outcome:
        left.append(check.left_s)
        return Outcome(True)

    run(check, {"first": part(look, 10), "second": part(look, 15), "third": part(look, 90)})
    assert left == pytest.approx([10, 25, 60], abs=1)


def test_nothing_is_started_when_no_time_is_left(tmp_path: Path) -> None:
    check = Check(tmp_path, seconds=0.5, environment=os.environ)
    assert check.run(python("print('never')")) == (CUT, "no time left")
    assert check.cut


def test_a_bench_that_dies_keeps_what_it_had_written(check: Check, tmp_path: Path) -> None:
    """As bench/<name> is run: --json FILE first."""
    file = Path(__file__).resolve().parents[2] / "bench/no_such_bench.py"
    assert not file.exists()
    code, found, lines = check.bench("no_such_bench.py")
    assert code == 2 and found == {} and lines[0] == "no_such_bench.py: exit code 2"
    body = "import sys, pathlib; pathlib.Path(sys.argv[2]).write_text({!r}); print('last words'); raise SystemExit(7)"
    for text, expected in (('{"left": ["b"]}', {"left": ["b"]}), ('{"left": [', {})):
        script = tmp_path / "bench.py"
        script.write_text(body.format(text))
        code, found, lines = check.bench(os.path.relpath(script, file.parent))
        assert (code, found) == (7, expected) and "last words" in lines


def test_kernels_are_counted_in_the_cache(check: Check) -> None:
    cache = check.out / "triton"

    def compiles(check: Check) -> Outcome:
        (cache / "ABC").mkdir(parents=True)
        (cache / "ABC/kernel.cubin").touch()
        return Outcome(True)

    assert num_compiled(cache) == 0
    assert [o.compiled for o in run(check, {"a": part(compiles), "b": part(lambda check: Outcome(True))})] == [1, 0]


def test_tables_show_rows_goals_and_what_is_missing() -> None:
    document = {
        "columns": ["kernel", "us"],
        "rows": [["norm | fused", 12.3456], ["decode", "-"]],
        "goals": [
            {"name": "norm", "value": 0.9, "bound": 0.85, "at_least": True, "met": True},
            {"name": "decode", "value": 5.0, "bound": 4.0, "at_least": False, "met": False},
        ],
        "failed": {"sample": "RuntimeError: no"},
        "left": ["experts"],
    }
    lines = tables({"kernels": json.loads(json.dumps(document)), "never ran": {}})
    assert lines == [
        "",
        "**kernels**",
        "",
        "| kernel | us |",
        "| --- | --- |",
        "| norm / fused | 12.35 |",
        "| decode | - |",
        "",
        "- norm: 0.9 (>= 0.85) met",
        "- decode: 5 (<= 4) **missed**",
        "- **failed** sample: RuntimeError: no",
        "- not measured: experts",
    ]
