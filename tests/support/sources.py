"""The packaged folders, their modules, and the imports that a module's text names: what the structural tests read."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Sources:
    """The packaged folders as pyproject.toml maps them, and their modules."""

    def __init__(self) -> None:
        self.root = ROOT
        self.pyproject: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
        mapping: dict[str, str] = self.pyproject["tool"]["setuptools"]["package-dir"]
        self.folders = sorted(mapping.values())

    def modules(self, folder: str) -> list[Path]:
        """Our own modules under ``folder``, generated code left out."""
        return sorted(path for path in (ROOT / folder).rglob("*.py") if "_pb2" not in path.name)

    def dotted(self, path: Path) -> str:
        """A source file's name as it is imported."""
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        return ".".join(["biphase", *(parts[:-1] if parts[-1] == "__init__" else parts)])

    def docstring(self, path: Path) -> str:
        return ast.get_docstring(ast.parse(path.read_text(), str(path))) or ""

    def imports(self, path: Path) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of everything that a module imports, wherever in it; ``from a import b`` gives a.b."""
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
