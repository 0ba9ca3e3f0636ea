"""Breaks each kernel on purpose, in a copy, and demands that its tests turn red.

    python tests/kernels/on_triton/mutations [OP...] [--jobs 2]

The files beside this one list breaks as (file, old text, new text, pytest node). Exit code 1 if a break goes unnoticed.
A node runs without its long tests first, then with them.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parent))
from listing import ROOT, Mutation, ops_with_mutations, read_mutations

T = TypeVar("T")

COPIED = ("kernels", "tests", "pyproject.toml")
LIMIT_S = 900.0
NO_TESTS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """``noticed``: "noticed", and how if not by a failed test; None where nothing noticed."""

    mutation: Mutation
    noticed: str | None
    seconds: float
    output: str


class Copy:
    """A copy of the kernels and their tests, in which ``biphase.kernels`` is the copy's."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, root)
        view = root / "view" / "biphase"
        view.mkdir(parents=True)
        packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
        for folder in packages.values():
            (view / folder).symlink_to((root if folder in COPIED else ROOT) / folder)
        for path in ROOT.iterdir():
            if path.is_dir() and not path.name.startswith(".") and not (root / path.name).exists():
                (root / path.name).symlink_to(path)
        others = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
        path = os.pathsep.join([str(root / "view"), *others])
        # a change within a second of the last would be taken for unchanged
        self.environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}

    def imported_from(self) -> Path:
        code = "import biphase.kernels.gpu.launch as m; print(m.__file__)"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return Path(done.stdout.strip()).resolve()

    def try_out(self, mutation: Mutation) -> Verdict:
        path = self.root / mutation.file
        before, began_s = path.read_text(), time.monotonic()
        if before.count(mutation.old) != 1:
            return Verdict(mutation=mutation, noticed=None, seconds=0, output="its text is not there exactly once")
        path.write_text(before.replace(mutation.old, mutation.new))
        try:
            noticed, output = self.run(mutation.node)
            if noticed is None:
                noticed, output = self.run(mutation.node, "--long")
        finally:
            path.write_text(before)
        return Verdict(mutation=mutation, noticed=noticed, seconds=time.monotonic() - began_s, output=output)

    def run(self, *arguments: str) -> tuple[str | None, str]:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=line", *arguments]
        try:
            done = subprocess.run(
                command,
                cwd=self.root,
                env=self.environment,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "noticed (hung)", ""
        output = (done.stdout + done.stderr)[-2000:]
        if done.returncode < 0:
            return f"noticed (crashed {-done.returncode})", output
        if done.returncode == 1 and " failed" in output:
            return "noticed", output
        if done.returncode not in (0, NO_TESTS):
            output = f"pytest could not run it (exit code {done.returncode})\n{output}"
        return None, output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="default: all that have a list")
    parser.add_argument("--jobs", type=int, default=2, help="tests that run at a time")
    arguments = parser.parse_args()
    mutations = [m for op in arguments.op or ops_with_mutations() for m in read_mutations(op)]
    with tempfile.TemporaryDirectory() as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for index in range(arguments.jobs):
            copy = Copy(Path(folder).resolve() / str(index))
            if not copy.imported_from().is_relative_to(copy.root):
                sys.exit(f"{sys.argv[0]}: biphase.kernels is imported from {copy.imported_from()}, not from the copy")
            copies.put(copy)

        def with_copy(task: Callable[[Copy], T]) -> T:
            copy = copies.get()
            try:
                return task(copy)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(arguments.jobs) as pool:
            nodes = sorted({mutation.node for mutation in mutations})
            for node, (noticed, output) in zip(
                nodes, pool.map(lambda node: with_copy(lambda copy: copy.run(node)), nodes), strict=True
            ):
                if noticed:
                    sys.exit(f"{node} fails without any break:\n{output}")
            verdicts = []
            for verdict in pool.map(lambda m: with_copy(lambda copy: copy.try_out(m)), mutations):
                verdicts.append(verdict)
                print(f"{verdict.noticed or 'SURVIVED':<20} {verdict.seconds:6.1f} s  {verdict.mutation}", flush=True)
                if verdict.noticed is None:
                    print("    " + verdict.output.replace("\n", "\n    "), flush=True)
    survived = sum(verdict.noticed is None for verdict in verdicts)
    print(f"{len(verdicts)} mutations: {len(verdicts) - survived} noticed, {survived} survived")
    return 1 if survived or not verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
