"""Everything that a GPU is needed for, one part after the other, each with its own limit; results written as they come.

    scripts/gpu_check.sh [--out DIR] [--only PART...] [--seconds 520] [--smoke]

Parts: compile (all kernel variants, in a pool of processes: later parts find them in Triton's cache), tests (kernels and
the whole step against their references, in bfloat16, float16 and fp8), kernels (bench/kernels.py), engine
(bench/engine_gpu.py with made-up Llama-3-8B, and 4 layers of Mixtral-8x7B), pair (bench/gpu_pair.py: prefill and decode
processes on one GPU). --out gets at most 6 files: summary.md and one per part; without it they go to bench/results/<gpu>.
Exit code 1 if a test failed or a part broke or was cut, 2 if the machine lacks something; a missed goal is no failure.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, TOTAL_S
from gpu_run import ROOT, Check, run_parts

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
_PROBE = """
import json, torch, triton
found = {"torch": torch.__version__, "triton": triton.__version__, "device": "", "capability": 0}
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    found |= {"device": torch.cuda.get_device_name(), "capability": 10 * major + minor}
print(json.dumps(found))
"""
_INSTALL_S = 60


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*PARTS],
        default=[*PARTS],
        metavar="PART",
        help="; ".join(f"{name}: at most {part.limit_s:.0f} s" for name, part in PARTS.items()),
    )
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help=f"for the whole run (default: {TOTAL_S})")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny, on any machine: tests this command, measures nothing"
    )
    return parser.parse_args()


def lacking() -> list[str]:
    """What this machine has not, in words."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name.partition(".")[0]) is None]
    found = [f"the Python package {name}" for name in missing]
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        found.append(f"Python 3.11 to 3.13 (this is {sys.version.split()[0]})")
    return found


def probe() -> dict[str, Any]:
    """The GPU and what drives it; another process looks, so that this one holds none of the GPU's memory."""
    done = subprocess.run([sys.executable, "-c", _PROBE], check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"gpu_check: torch and triton do not load: {(done.stderr.splitlines() or ['?'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def folders() -> dict[str, str]:
    """Subpackages of biphase at the top: name -> folder, as pyproject.toml says."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    return {package.removeprefix("biphase."): folder for package, folder in told.items()}


def install(site: Path) -> str:
    """The checkout as a package in ``site``; where setuptools cannot build it, links to its folders. Says which."""
    said = _install_with_pip(site)
    if not said:
        return "installed with pip"
    shutil.rmtree(site, ignore_errors=True)
    view = site / "biphase"
    view.mkdir(parents=True)
    for name, folder in folders().items():
        (view / name).symlink_to(ROOT / folder)
    return f"linked, since pip did not build it here ({said})"


def _install_with_pip(site: Path) -> str:
    """Why it did not work, or nothing."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(site)]
    with tempfile.TemporaryDirectory() as copy:
        source = Path(copy) / "biphase"  # a build leaves folders in its source
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for folder in folders().values():
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
        try:
            done = subprocess.run(
                [*command, str(source)], check=False, capture_output=True, text=True, timeout=_INSTALL_S, cwd=copy
            )
        except subprocess.TimeoutExpired:
            return f"it took more than {_INSTALL_S} s"
    if done.returncode:
        errors = [line.strip() for line in done.stderr.splitlines() if "error" in line.lower() or "No module" in line]
        return (errors or [f"exit code {done.returncode}"])[-1]
    expected = [site / "biphase" / name for name in (*folders(), "kernels/gpu/tuning_table.json")]
    return "".join(f"{path.name} is missing" for path in expected if not path.exists())


def environment(site: Path, cache: Path) -> dict[str, str]:
    """Of every process: the installed copy first, kernels compiled into one cache, nobody's settings of kernels."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "BIPHASE_", "PYTEST_"))
    }
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return ours | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONUNBUFFERED": "1",
    }


def smoke_note(device: str) -> str:
    """A smoke run's rows have the names of the real ones."""
    return f"smoke: tiny shapes{'' if device else ', on the CPU'}: the figures mean nothing"


def main() -> int:
    arguments = parse()
    began_s = time.monotonic()
    missing = lacking()
    if missing:
        print(f"gpu_check: this machine lacks {', '.join(missing)}", file=sys.stderr)
        return 2
    found = probe()
    if not found["device"] and not arguments.smoke:
        print(f"gpu_check: torch {found['torch']} finds no CUDA GPU here (--smoke needs none)", file=sys.stderr)
        return 2
    if found["device"] and found["capability"] < 80:
        print(
            f"gpu_check: {found['device']} has capability {found['capability'] / 10}, kernels need 8.0", file=sys.stderr
        )
        return 2
    device = found["device"] or "no GPU (smoke)"
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    with tempfile.TemporaryDirectory() as folder:
        out = (arguments.out or (Path(folder) / "out" if arguments.smoke else ROOT / "bench/results" / slug)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        site, cache = Path(folder) / "site", Path(folder) / "triton"
        how = install(site)
        versions = f"torch {found['torch']}, triton {found['triton']}, {os.cpu_count()} cores; {how}"
        note = smoke_note(found["device"]) if arguments.smoke else ""
        if note:
            print(note)
        print(f"gpu_check on {device}: {versions}; results in {out}", flush=True)
        check = Check(
            out,
            seconds=arguments.seconds - (time.monotonic() - began_s),
            environment=environment(site, cache),
            smoke=arguments.smoke,
            capability=found["capability"],
        )
        names = list(dict.fromkeys(arguments.only))
        try:
            outcomes = run_parts(
                check,
                PARTS,
                names,
                title="\n\n".join(filter(None, [f"# {device}", note, versions])),
                cache=cache,
                say=lambda line: print(line, flush=True),
            )
        finally:
            check.stop()
    return 0 if all(outcome.ok and not outcome.cut for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
