"""Everything that a GPU is needed for, one part after the other, each with its own limit; results written as they come.

    scripts/gpu_check.sh [--out DIR] [--only PART...] [--seconds 520] [--smoke]

Parts: compile (all kernel variants, in a pool of processes: later parts find them in Triton's cache), tests (kernels and
the whole step against their references, in bfloat16, float16 and fp8), kernels (bench/kernels.py), engine
(bench/engine_gpu.py with made-up Llama-3-8B, and 4 layers of Mixtral-8x7B), pair (bench/gpu_pair.py: prefill and decode
processes on one GPU). --out gets at most 6 files: summary.md and one per part; copy them to bench/results/<gpu>/ to keep
them. Exit code 1 if a test failed or a part broke, 2 if the machine lacks something; a missed goal is no failure.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "torch",
    "triton",
    "numpy",
    "pytest",
    "safetensors",
    "grpc",
    "google.protobuf",
    "msgpack",
    "xxhash",
    "hypothesis",
)
LIMITS_S = {"compile": 120, "tests": 150, "kernels": 100, "engine": 150, "pair": 60}
TESTS = ("tests/kernels/on_triton", "tests/engine/gpu")


@dataclass
class Outcome:
    """How a part went. ``files``: what it left for --out."""

    part: str
    ok: bool
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)


class Check:
    """One run: an installed copy of the checkout, an environment for its processes, a deadline."""

    def __init__(self, out: Path, site: Path, cache: Path, *, seconds: float, smoke: bool) -> None:
        self.out = out
        self.smoke = smoke
        self._ends_s = time.monotonic() + seconds
        paths = [str(site), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "TRITON_CACHE_DIR": str(cache),
            "TRITON_DEFAULT_FP_FUSION": "1",
            "PYTHONUNBUFFERED": "1",
        }

    def run(self, command: Sequence[str], limit_s: float) -> tuple[int, str]:
        """Exit code (124 at the limit) and all output."""
        left_s = min(limit_s, self._ends_s - time.monotonic())
        if left_s <= 1:
            return 124, "no time left"
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=left_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            output, _ = process.communicate()
            return 124, output + f"\nstopped after {left_s:.0f} s"
        return process.returncode, output

    def bench(self, name: str, *arguments: str, limit_s: float) -> tuple[bool, dict[str, Any], list[str]]:
        """Whether it ran to its end, its JSON, and its last lines if not. Goals it misses are in the JSON."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "out.json"
            command = [sys.executable, f"bench/{name}", "--json", str(file), *arguments]
            code, output = self.run(command + (["--smoke"] if self.smoke else []), limit_s)
            found = json.loads(file.read_text()) if file.exists() else {}
        ok = code == 0 and bool(found)
        return ok, found, [] if ok else [f"exit code {code}", *output.splitlines()[-25:]]


def compile_part(check: Check) -> Outcome:
    import torch

    command = [sys.executable, "bench/aot.py", "--jobs", str(min(16, os.cpu_count() or 1))]
    command += ["--cache", check.environment["TRITON_CACHE_DIR"], "--json", str(check.out / "compile.json")]
    if check.smoke:
        command += ["--quick", "--op", "embed", "--targets", "90"]
    else:
        major, minor = torch.cuda.get_device_capability()
        known = [target for target in (80, 89, 90, 100) if target <= 10 * major + minor]
        command += ["--targets", str(known[-1])]
    code, output = check.run(command, LIMITS_S["compile"])
    return Outcome("compile", code == 0, lines=output.splitlines()[-8:])


def tests_part(check: Check) -> Outcome:
    """A process per test file, some at once: compiling is what takes the time."""
    files = sorted(file for folder in TESTS for file in (ROOT / folder).glob("test_*.py"))
    if check.smoke:
        files = [file for file in files if file.stem in ("test_embed", "test_step_batch")]
    base = [sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu_pytest.ini", "--rootdir", str(ROOT)]

    def test(file: Path) -> tuple[str, int, str]:
        code, output = check.run([*base, str(file.relative_to(ROOT))], LIMITS_S["tests"])
        return file.stem, code, output

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(test, files))
    (check.out / "tests.txt").write_text(
        "\n".join(f"== {name}: exit code {code}\n{output}" for name, code, output in found)
    )
    lines = [f"{name}: {(output.splitlines() or [''])[-1]}" for name, code, output in found]
    return Outcome("tests", all(code == 0 for _, code, _ in found), lines=lines)


def kernels_part(check: Check) -> Outcome:
    ok, found, lines = check.bench("kernels.py", limit_s=LIMITS_S["kernels"])
    return _benched(check, "kernels", ok, {"kernels": found}, lines)


def engine_part(check: Check) -> Outcome:
    half = LIMITS_S["engine"] / 2
    first_ok, first, first_lines = check.bench("engine_gpu.py", limit_s=half)
    mixtral = ("--model", "bench/configs/mixtral-8x7b.json", "--num-layers", "4")
    second_ok, second, second_lines = check.bench("engine_gpu.py", *mixtral, limit_s=half)
    both = {"llama-3-8b": first, "mixtral-8x7b, 4 layers": second}
    return _benched(check, "engine", first_ok and second_ok, both, first_lines + second_lines)


def pair_part(check: Check) -> Outcome:
    ok, found, lines = check.bench("gpu_pair.py", limit_s=LIMITS_S["pair"])
    return _benched(check, "pair", ok, {"pair": found}, lines)


PARTS: dict[str, Callable[[Check], Outcome]] = {
    "compile": compile_part,
    "tests": tests_part,
    "kernels": kernels_part,
    "engine": engine_part,
    "pair": pair_part,
}


def _benched(check: Check, part: str, ok: bool, found: dict[str, dict[str, Any]], errors: list[str]) -> Outcome:
    (check.out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = list(errors)
    for name, document in found.items():
        if not document:
            continue
        columns = document["columns"]
        lines += ["", f"**{name}**", "", _row(columns), _row(["---"] * len(columns))]
        lines += [_row([_shown(value) for value in row]) for row in document["rows"]]
        for goal in document["goals"]:
            sign = ">=" if goal["at_least"] else "<="
            verdict = "met" if goal["met"] else "**missed**"
            lines.append(f"- {goal['name']}: {goal['value']:.4g} ({sign} {goal['bound']:g}) {verdict}")
    return Outcome(part, ok, lines=lines)


def _row(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_summary(check: Check, device: str, outcomes: list[Outcome]) -> None:
    import torch
    import triton

    lines = [f"# {device}", "", f"torch {torch.__version__}, triton {triton.__version__}", "", "| part | result | s |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {o.part} | {'ok' if o.ok else '**failed**'} | {o.seconds:.0f} |" for o in outcomes]
    for outcome in outcomes:
        lines += ["", f"## {outcome.part}", "", *outcome.lines]
    (check.out / "summary.md").write_text("\n".join(lines) + "\n")


def install(folder: Path) -> str:
    """The checkout as a package in ``folder``; where setuptools cannot, links to its folders. Says which."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    with tempfile.TemporaryDirectory() as copy:
        source = Path(copy) / "biphase"  # a build leaves folders in its source
        ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
        done = subprocess.run(
            [*command, "--target", str(folder), str(source)], check=False, capture_output=True, text=True
        )
    if done.returncode == 0 and (folder / "biphase" / "kernels").is_dir():
        return "installed with pip"
    shutil.rmtree(folder, ignore_errors=True)
    view = folder / "biphase"
    view.mkdir(parents=True)
    for name in ("protos", "kernels", "engine", "kvtransfer", "prefill_worker", "decode_worker"):
        (view / name).symlink_to(ROOT / name)
    return "linked, since pip cannot build it here"


def lacking() -> list[str]:
    """What this machine has not, in words."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    found = [f"python package {name}" for name in missing]
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found.append(f"Python 3.11 to 3.13 (this is {sys.version.split()[0]})")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check_results"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=[*PARTS], default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=520, help="for the whole run")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny, on any machine: tests this command, measures nothing"
    )
    arguments = parser.parse_args()
    missing = lacking()
    if missing:
        print(f"gpu_check: this machine lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    import torch

    if not arguments.smoke and not torch.cuda.is_available():
        print(f"gpu_check: torch {torch.__version__} finds no CUDA GPU here", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU (smoke)"
    arguments.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        site, cache = Path(folder) / "site", Path(folder) / "triton"
        print(f"gpu_check on {device}: {install(site)}", flush=True)
        check = Check(arguments.out.resolve(), site, cache, seconds=arguments.seconds, smoke=arguments.smoke)
        for part in arguments.only:
            began_s = time.monotonic()
            outcome = PARTS[part](check)
            outcome.seconds = time.monotonic() - began_s
            outcomes.append(outcome)
            write_summary(check, device, outcomes)
            print(f"{part}: {'ok' if outcome.ok else 'FAILED'} in {outcome.seconds:.0f} s", flush=True)
            for line in outcome.lines:
                print(f"  {line}", flush=True)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
