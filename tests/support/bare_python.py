"""Run a module as ``python -m`` does, in a Python that has none of the packages that a bare GPU machine lacks.

python bare_python.py MODULE [ARGUMENT...]

``bare_environment`` does so to a process and all that it starts.
"""

import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

MISSING = (
    "ray",
    "pydantic",
    "gguf",
    "grpc_health",
    "grpc_reflection",
    "psutil",
    "tokenizers",
    "jinja2",
    "rich",
    "yaml",
    "transformers",
    "huggingface_hub",
)


class Without:
    """A finder of the import system that does not find some packages."""

    def __init__(self, finder: Any, missing: tuple[str, ...]) -> None:
        self._finder = finder
        self._missing = missing

    def find_spec(self, name: str, *rest: Any) -> ModuleSpec | None:
        if name.partition(".")[0] in self._missing:
            return None
        spec: ModuleSpec | None = self._finder.find_spec(name, *rest)
        return spec

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def leave_out(missing: tuple[str, ...]) -> None:
    """From now on these packages are not installed."""
    there = sorted({name.partition(".")[0] for name in sys.modules} & set(missing))
    assert not there, f"imported already: {', '.join(there)}"
    sys.meta_path[:] = [Without(finder, missing) for finder in sys.meta_path]  # type: ignore[list-item]


def bare_environment(folder: Path) -> dict[str, str]:
    """An environment whose Pythons, however they are started, lack those packages; ``folder`` gets what does it."""
    lines = ["import sys", f"sys.path.append({str(Path(__file__).parent)!r})", "import bare_python"]
    lines += ["sys.path.pop()", "bare_python.leave_out(bare_python.MISSING)"]
    (folder / "sitecustomize.py").write_text("\n".join(lines) + "\n")
    paths = [str(folder), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


if __name__ == "__main__":
    leave_out(MISSING)
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
