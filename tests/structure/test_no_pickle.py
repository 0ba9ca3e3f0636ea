"""Nothing that can run code out of data: no pickle, no eval, no unsafe loader anywhere in our folders."""

import ast
from pathlib import Path

from support.sources import Sources

FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "unsafe_load"),
    ("yaml", "full_load"),
    ("numpy", "load"),
    ("np", "load"),
    ("multiprocessing", "Queue"),
    ("multiprocessing", "Pipe"),
}


def offences(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            bad = [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom):
            first = (node.module or "").split(".")[0]
            bad = [node.module or ""] if first in FORBIDDEN_MODULES else []
            bad += [alias.name for alias in node.names if (first, alias.name) in FORBIDDEN_ATTRIBUTES]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            bad = [node.func.id] if node.func.id in FORBIDDEN_CALLS else []
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            pair = (node.value.id, node.attr)
            bad = [".".join(pair)] if pair in FORBIDDEN_ATTRIBUTES else []
        else:
            continue
        found += [f"{path}:{node.lineno} {name}" for name in bad]
    return found


def test_our_folders_hold_none_of_it(sources: Sources) -> None:
    folders = [*sources.folders, "bench", "examples", "scripts", "tests"]
    found = [line for folder in folders for path in sources.modules(folder) for line in offences(path)]
    assert not found, "\n".join(found)


def test_the_gate_sees_what_it_is_for(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import pickle\nfrom marshal import loads\nfrom torch import load\nimport yaml\nyaml.load('x')\neval('1')\n"
    )
    assert [line.split(" ")[1] for line in sorted(offences(bad))] == ["pickle", "marshal", "load", "yaml.load", "eval"]
