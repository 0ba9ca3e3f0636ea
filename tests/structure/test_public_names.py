"""Package __init__ files: import-light, and ``__all__`` is what they show."""

import ast
from dataclasses import dataclass
from pathlib import Path

from support.sources import Sources


@dataclass
class Init:
    """What an ``__init__`` binds at its top level: names of its own, names taken from our other modules, ``__all__``."""

    defined: set[str]
    imported: set[str]
    declared: list[str] | None


def read_init(path: Path) -> Init:
    init = Init(set(), set(), None)
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("biphase."):
            init.imported |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            init.defined.add(node.name)
        elif isinstance(node, ast.Assign):
            for name in (target.id for target in node.targets if isinstance(target, ast.Name)):
                if name == "__all__":
                    init.declared = list(ast.literal_eval(node.value))
                else:
                    init.defined.add(name)
    init.defined = {name for name in init.defined if not name.startswith("_")}
    return init


def test_all_equals_the_public_names(sources: Sources) -> None:
    """An ``__init__`` that only collects shows what it collects; one with code shows at least what it defines."""
    wrong = []
    for folder in sources.folders:
        for path in (sources.root / folder).rglob("__init__.py"):
            init = read_init(path)
            if init.declared is None:
                good = not init.imported or bool(init.defined)
            elif init.defined:
                good = init.defined <= set(init.declared) <= init.defined | init.imported
            else:
                good = sorted(init.declared) == sorted(init.imported)  # their order is the linter's
            if not good:
                wrong.append(f"{path.relative_to(sources.root)}: {init}")
    assert not wrong, "\n".join(wrong)


def test_every_module_opens_with_a_docstring(sources: Sources) -> None:
    bare = [
        str(path.relative_to(sources.root))
        for folder in sources.folders
        for path in sources.modules(folder)
        if not sources.docstring(path)
    ]
    assert bare == []


def test_folder_inits_import_nothing_but_the_clients(sources: Sources) -> None:
    heavy = [
        folder
        for folder in sources.folders
        if folder != "client"
        and (sources.root / folder / "__init__.py").exists()
        and any(sources.imports(sources.root / folder / "__init__.py"))
    ]
    assert heavy == []
