"""The name of what an instance serves: a short hash of weights and plan. Requests end on the generation they began on."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from biphase.cluster.deployment import Deployment

_KEYS = (
    *("model", "load_format", "device", "dtype", "kv_dtype", "max_model_len", "weights_cache"),
    *("kv_transport", "kv_codec", "kv_overlap", "inject_faults"),
)
"""Of a deployment: what an instance is started with."""
_NOT_OF_INSTANCES = ("replicas", "step_time")
"""Of a role's plan: what only the controller looks at."""
_WEIGHTS = (".gguf", ".safetensors", ".json")


def generation_of(deployment: Deployment) -> str:
    """Eight hex digits. Weights that were replaced in place change it, where they can be seen from here."""
    values = asdict(deployment)
    said = {key: values[key] for key in _KEYS}
    for role in ("prefill", "decode"):
        said[role] = {key: value for key, value in values[role].items() if key not in _NOT_OF_INSTANCES}
    said["weights"] = _stamp(Path(deployment.model))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:8]


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Sizes and times of the model's files; a hub name, or files of another host, have none."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        found = [(file.name, file.stat()) for file in files if file.suffix in _WEIGHTS]
    except OSError:
        return []
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
