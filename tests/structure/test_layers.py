"""Who may import whom, and which modules are pure."""

import re
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
    "planner": {"protos"},
    "cluster": {
        "protos",
        "kernels",
        "engine",
        "kvtransfer",
        "prefill_worker",
        "decode_worker",
        "router",
        "planner",
        "client",
    },
}

PURE = {
    "biphase.engine.block_pool",
    "biphase.prefill_worker.scheduler",
    "biphase.decode_worker.scheduler",
    "biphase.kvtransfer.exports",
    "biphase.kvtransfer.handoff",
    "biphase.router.policy",
    "biphase.router.lifecycle",
    "biphase.cluster.reconcile",
    "biphase.engine.step_fit",
    "biphase.planner.autoscaler",
    "biphase.planner.capacity",
    "biphase.planner.history",
    "biphase.planner.policy",
    "biphase.planner.replay",
    "biphase.planner.schedules",
    "biphase.planner.signals",
    "biphase.planner.stragglers",
}
"""These must call themselves pure; every module that does is held to it, and so is all that it imports of ours."""

NOT_IN_PURE = {"asyncio", "multiprocessing", "os", "random", "socket", "subprocess", "threading", "time"}
"""Of the standard library: clocks, chance, threads and the outside."""

PURE_LIBRARIES = {"cronsim", "numpy", "xxhash"}
"""Of other libraries: those that only compute."""

HOLD_VALUES = {
    "biphase.protos.errors",  # exceptions; of gRPC only the names of its status codes
    "biphase.protos.process",  # the announcement, beside what writes it
    "biphase.router.config",  # limits, one of them the message size of the gRPC settings
    "biphase.cluster.deployment",  # the same limits
}
"""Ours that a pure module may take values from, though they import more."""


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
    claims = {name for name, path in files.items() if re.search(r"\bPure[:.]", sources.docstring(path))}
    assert sorted(PURE - claims) == []
    wrong: list[str] = []
    seen: set[str] = set()
    due = sorted(claims)
    while due:
        module = due.pop()
        if module in seen:
            continue
        seen.add(module)
        for line, name in sources.imports(files[module]):
            first = name.split(".")[0]
            owner = name if name in files else name.rpartition(".")[0]
            if owner in files:
                due += [owner] if owner not in HOLD_VALUES else []
            elif first not in (sys.stdlib_module_names | PURE_LIBRARIES) - NOT_IN_PURE:
                wrong.append(f"{module}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)
