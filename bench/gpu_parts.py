"""The parts of scripts/gpu_check.sh: what each runs, and for how long at most."""

import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_run import CUT, Check, Outcome, Part, tables

_TESTS = (
    "tests/kvtransfer/test_gpu_planes.py",
    *(
        f"tests/kernels/on_triton/test_{name}.py"
        for name in (
            "sample",
            "moe",
            "local_experts",
            "decode_attention",
            "prefill_attention",
            "kv_pack",
            "rms_norm",
            "rope_and_cache",
            "silu_mul",
            "decode_attention_refusals",
            "prefill_attention_refusals",
            "embed",
            "dummy_weights",
            "gpu_memory",
        )
    ),
    "tests/engine/gpu/test_gpu_engine.py",
)
"""Files whose tests launch kernels or copy between processes; those that take longest come first."""
_TESTS_AT_ONCE = 12
_TESTS_PER_PROCESS = 16
_PYTEST = (sys.executable, "-m", "pytest", "-q", "-c", "tests/gpu_pytest.ini", "--rootdir", ".")
_MIXTRAL = (
    "--model",
    "bench/configs/mixtral-8x7b.json",
    "--num-layers",
    "4",
    "--only",
    "prefill",
    "decode",
    "launches",
)
_WARM = (sys.executable, "bench/gpu_pair.py", "--only", "tokens")
_OTHER_ENGINES_S = 50
"""Of the engine part's time, what Llama-3-8B leaves to the others."""


def compile_part(check: Check) -> Outcome:
    """All variants of production, in a pool of processes; later parts find them in Triton's cache."""
    command = [sys.executable, "bench/aot.py", "--jobs", str(min(16, os.cpu_count() or 1))]
    command += ["--cache", check.environment["TRITON_CACHE_DIR"], "--json", str(check.out / "compile.json")]
    if check.smoke:
        command += ["--quick", "--op", "embed", "--targets", "90"]
    else:
        command += ["--targets", str(max(target for target in (80, 89, 90, 100) if target <= check.capability))]
    with ThreadPoolExecutor(1) as pool:
        # the pair's small model in float32 is no variant of production: it is warmed by running it
        warming = None if check.smoke else pool.submit(check.run, _WARM)
        code, output = check.run(command, environment={} if check.smoke else {"BIPHASE_AOT_LAUNCHERS": "1"})
        if warming is not None:
            warming.result()
    said = output.splitlines()
    failed = [f"- {line}" for line in said if line.startswith("FAILED")]
    return Outcome(code == 0, [*failed, f"- {said[-1]}" if said else "- it said nothing"])


def tests_part(check: Check) -> Outcome:
    """Compiling is what takes the time, so the tests are spread over processes."""
    files = _TESTS[-4:-3] if check.smoke else _TESTS
    environment = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    code, output = check.run([*_PYTEST, "--collect-only", *files], environment=environment)
    chunks = chunks_of(node_ids(output))
    if code or not chunks:
        (check.out / "tests.txt").write_text(output)
        return Outcome(False, ["no tests were collected", "```", *output.splitlines()[-20:], "```"])

    def test(chunk: list[str]) -> tuple[int, str]:
        return check.run([*_PYTEST, *chunk], environment=environment)

    with ThreadPoolExecutor(min(_TESTS_AT_ONCE, os.cpu_count() or 1)) as pool:
        found = list(pool.map(test, chunks))
    lines, texts = [], []
    for chunk, (code, output) in zip(chunks, found, strict=True):
        name = chunk[0].partition("::")[0]
        said = output.splitlines() or [""]
        lines.append(f"- {Path(name).stem}, {len(chunk)} tests: {'stopped' if code == CUT else said[-1].strip('= ')}")
        lines += [f"  - {line[:300]}" for line in said if line.startswith(("FAILED", "ERROR"))]
        texts.append(f"== {name}: exit code {code}\n{output}")
    (check.out / "tests.txt").write_text("\n".join(texts))
    return Outcome(all(code == 0 for code, _ in found), lines)


def node_ids(collected: str) -> list[str]:
    """Of ``pytest --collect-only -q``'s output."""
    return [line for line in collected.splitlines() if line.startswith("tests/") and "::" in line]


def chunks_of(nodes: Sequence[str], size: int = _TESTS_PER_PROCESS) -> list[list[str]]:
    """Runs of at most ``size`` tests of one file: an error that ends all use of the GPU takes no more than those along."""
    chunks: list[list[str]] = []
    for node in nodes:
        same = chunks and chunks[-1][0].partition("::")[0] == node.partition("::")[0]
        if same and len(chunks[-1]) < size:
            chunks[-1].append(node)
        else:
            chunks.append([node])
    return chunks


def kernels_part(check: Check) -> Outcome:
    """One process for all groups; another for what is left where one of them took the process or the device with it."""
    documents: dict[str, dict[str, Any]] = {}
    errors: list[str] = []
    only: list[str] = []
    while True:
        code, found, said = check.bench("kernels.py", *(["--only", *only] if only else []))
        documents["kernels" if not only else f"kernels, from {only[0]} on"] = found
        errors += said
        # of a process that died its first group is what it died of
        only = found.get("left", [])[0 if code in (0, 1) else 1 :]
        if code in (0, CUT) or not only:
            break
    return _benched(check, "kernels", documents, errors)


def engine_part(check: Check) -> Outcome:
    documents: dict[str, dict[str, Any]] = {}
    smoke = check.smoke
    code, documents["llama-3-8b"], errors = check.bench("engine_gpu.py", limit_s=check.left_s - _OTHER_ENGINES_S)
    code, documents["mixtral-8x7b, 4 layers"], said = check.bench("engine_gpu.py", *_MIXTRAL)
    errors += said
    if not smoke and code != CUT and check.left_s > 30:
        # told beside the goals, which are those of the default
        name, dependent = "llama-3-8b, programmatic dependent launch", {"BIPHASE_PDL": "1"}
        _, documents[name], said = check.bench("engine_gpu.py", "--only", "decode", environment=dependent)
        errors += said
    return _benched(check, "engine", documents, errors)


def pair_part(check: Check) -> Outcome:
    _, found, errors = check.bench("gpu_pair.py")
    return _benched(check, "pair", {"pair": found}, errors)


def _benched(check: Check, part: str, found: dict[str, dict[str, Any]], errors: list[str]) -> Outcome:
    (check.out / f"{part}.json").write_text(json.dumps(found, indent=1) + "\n")
    return Outcome(not errors, [*errors, *tables(found)])


PARTS: dict[str, Part] = {
    "compile": Part(limit_s=95, run=compile_part),
    "tests": Part(limit_s=110, run=tests_part),
    "kernels": Part(limit_s=90, run=kernels_part),
    "engine": Part(limit_s=140, run=engine_part),
    "pair": Part(limit_s=70, run=pair_part),
}
TOTAL_S = 520
"""With installing: well within 9 minutes."""
