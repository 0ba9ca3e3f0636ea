"""What an import drags in, each in a process of its own."""

import subprocess
import sys

import pytest
from support.sources import Sources

HEAVY = ("torch", "triton", "ray", "transformers")


def heavy_after(code: str, heavy: tuple[str, ...]) -> str:
    """Run ``code`` in a fresh interpreter; which of ``heavy`` it left in sys.modules."""
    program = f"import sys\n{code}\nprint('LOADED', *(name for name in {heavy!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("LOADED", 1)[1].strip()


@pytest.mark.parametrize(
    ("folder", "heavy"),
    [
        ("client", (*HEAVY, "pydantic", "yaml", "rich")),
        ("protos", (*HEAVY, "pydantic")),
        ("router", (*HEAVY, "pydantic")),
        ("planner", (*HEAVY, "numpy", "google.protobuf")),
        ("kvtransfer", ("ray", "transformers", "pydantic")),
    ],
)
def test_folder_stays_light(sources: Sources, folder: str, heavy: tuple[str, ...]) -> None:
    names = [sources.dotted(path) for path in sources.modules(folder) if path.name != "__main__.py"]
    assert heavy_after("\n".join(f"import {name}" for name in names), heavy) == ""


def test_the_command_shows_its_help_without_torch_and_ray() -> None:
    code = (
        "import biphase.cluster.cli as cli\n"
        "sys.argv = ['biphase', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code in (0, None), end.code"
    )
    assert heavy_after(code, HEAVY) == ""


def test_serve_refuses_a_mistake_without_torch_and_ray() -> None:
    """What a user gets wrong is said in a second, not after the import of what would run."""
    code = (
        "import biphase.cluster.cli as cli\n"
        "sys.argv = ['biphase', 'serve', '--model', 'smollm2', '--gpus', '2']\n"
        "assert cli.main() == 2"
    )
    assert heavy_after(code, HEAVY) == ""


def test_pure_modules_import_without_grpc_and_numpy(sources: Sources) -> None:
    code = "import biphase.engine.block_pool, biphase.prefill_worker.scheduler, biphase.decode_worker.scheduler"
    assert heavy_after(code, (*HEAVY, "grpc", "numpy")) == ""
