"""Reads the lists of breaks: ``<op>.py`` beside this file, ``MUTATIONS`` in it."""

import ast
import runpy
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
_NOT_LISTS = {"__init__", "__main__", "listing"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """``file`` and ``node`` are relative to the clone."""

    op: str
    file: str
    old: str
    new: str
    node: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) or "nothing" for text in (self.old, self.new))
        return f"{self.op}: {old}  ->  {new}"

    def count(self) -> int:
        """How often the text occurs: once, or the list is out of date."""
        return (ROOT / self.file).read_text().count(self.old)

    def node_exists(self) -> bool:
        file, *names = self.node.split("[")[0].split("::")
        if not (ROOT / file).is_file():
            return False
        body: list[ast.stmt] = ast.parse((ROOT / file).read_text()).body
        for name in names:
            found = [
                n
                for n in body
                if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and n.name == name
            ]
            if not found:
                return False
            body = found[0].body
        return True


def ops_with_mutations() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.py") if path.stem not in _NOT_LISTS)


def read_mutations(op: str) -> list[Mutation]:
    entries = runpy.run_path(str(HERE / f"{op}.py"))["MUTATIONS"]
    return [Mutation(op=op, file=file, old=old, new=new, node=node) for file, old, new, node in entries]
