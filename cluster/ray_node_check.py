"""What a host must have before it gets an instance: the same biphase, Ray and Python as the head, and the weights.

`installed` runs there, as a Ray task; a host where it cannot even be imported has no biphase. Of the weights each backend
asks its hosts.
"""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from biphase.cluster.deployment import Deployment
from biphase.cluster.version import version
from biphase.protos import model_source
from biphase.protos.errors import SetupError, one_line

Installed = dict[str, str]
"""``biphase``, ``ray``, ``python``: versions; ``weights``: why they are not there, empty where they are."""


class Weights(NamedTuple):
    """What hosts are asked for; ``dummy``: only the model's configuration is."""

    model: str
    dummy: bool


NAMES = {"biphase": "biphase", "ray": "Ray", "python": "Python"}


def installed(model: str, dummy: bool) -> Installed:
    """What this host has."""
    import ray

    return {
        "biphase": version(),
        "ray": ray.__version__,
        "python": platform.python_version(),
        "weights": weights_lack(Weights(model, dummy)),
    }


def weights_of(deployment: Deployment) -> Weights:
    return Weights(deployment.model, deployment.load_format == "dummy")


def weights_lack(weights: Weights) -> str:
    """Why this host does not have them; empty: it does."""
    model, dummy = weights
    try:
        if dummy and Path(model).suffix == ".json":
            return "" if Path(model).exists() else f"{model}: no such file"
        if dummy:
            model_source.resolve(model, weights=False)
        else:
            model_source.check_weights(model)
    except (
        SetupError,
        OSError,
        RuntimeError,
    ) as error:  # a mount that is away, a folder nobody may read, a ~ of nobody
        return one_line(error)
    return ""


def reason_against(node: str, there: Mapping[str, str], here: Mapping[str, str]) -> str:
    """Why ``node`` gets no instance, in one line that names both sides; empty: it may. Python's last number may differ."""
    for key, name in NAMES.items():
        its, ours = there[key], here[key]
        if key == "python":
            its, ours = its.rpartition(".")[0], ours.rpartition(".")[0]
        if its != ours:
            return f"{node} has {name} {its}, the head has {ours}: install the same on every node"
    if there["weights"]:
        but = "" if here["weights"] else "; the head has them"
        return f"{node} has no weights: {there['weights']}{but}"
    return ""


def has_answered(error: BaseException) -> bool:
    """Whether a check that failed says something of its host all the same: it has no biphase."""
    return "No module named 'biphase" in str(error)


def reason_of_failure(node: str, error: BaseException, here: Mapping[str, str]) -> str:
    """Of a host that could not even say what it has; ``here`` is empty where the head could not."""
    text = one_line(error)
    if here and has_answered(error):
        return f"{node} has no biphase, the head has {here['biphase']}: install the same on every node"
    return f"{node} does not say what is installed there: {text[:160] or type(error).__name__}"
