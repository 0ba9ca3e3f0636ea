"""Who may import whom, and which modules are pure."""

import sys

from support.sources import Sources

MAY_IMPORT = {
    "protos": set(),
    "kernels": set(),
    "engine": {"protos", "kernels"},
    "kvtransfer": {"protos", "kernels"},
    "prefill_worker": {"engine", "kvtransfer", "protos"},
    "decode_worker": {"engine", "kvtransfer", "protos"},
    "router": {"protos"},
    "client": {"protos"},
    "cluster": {"protos", "kernels", "engine", "kvtransfer", "prefill_worker", "decode_worker", "router", "client"},
}

PURE = [
    "biphase.kernels.kv_layout",
    "biphase.protos.ids",
    "biphase.protos.values",
    "biphase.engine.step",
    "biphase.engine.block_pool",
    "biphase.engine.sequence",
    "biphase.prefill_worker.scheduler",
    "biphase.decode_worker.scheduler",
    "biphase.kvtransfer.exports",
    "biphase.router.policy",
]
"""Decisions and tables: they import the standard library and other modules that are pure by the same rule."""

NOT_IN_PURE = {"asyncio", "multiprocessing", "os", "random", "socket", "subprocess", "threading", "time"}
"""Of the standard library: clocks, chance, threads and the outside."""


def test_every_folder_has_its_row(sources: Sources) -> None:
    assert sources.folders == sorted(MAY_IMPORT)


def test_folders_import_only_what_their_row_allows(sources: Sources) -> None:
    wrong = []
    for folder, allowed in MAY_IMPORT.items():
        for path in sources.modules(folder):
            for line, name in sources.imports(path):
                parts = name.split(".")
                if parts[0] == "biphase" and parts[1] not in allowed | {folder}:
                    wrong.append(f"{path.relative_to(sources.root)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_packaged_imports_what_is_not(sources: Sources) -> None:
    outside = {"tests", "bench", "scripts", "examples", *sources.folders}
    wrong = [
        f"{path.relative_to(sources.root)}:{line} imports {name}"
        for folder in sources.folders
        for path in sources.modules(folder)
        for line, name in sources.imports(path)
        if name.split(".")[0] in outside
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_modules_touch_no_clock_no_thread_no_network(sources: Sources) -> None:
    files = {sources.dotted(path): path for folder in sources.folders for path in sources.modules(folder)}
    assert [name for name in PURE if name not in files] == []
    wrong: list[str] = []
    seen: set[str] = set()
    due = list(PURE)
    while due:
        module = due.pop()
        if module in seen:
            continue
        seen.add(module)
        for line, name in sources.imports(files[module]):
            first = name.split(".")[0]
            owner = name if name in files else name.rpartition(".")[0]
            if owner in files:
                due.append(owner)
            elif first == "biphase" or first not in sys.stdlib_module_names or first in NOT_IN_PURE:
                wrong.append(f"{module}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)
