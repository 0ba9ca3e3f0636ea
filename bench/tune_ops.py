"""The ops that read the tuning table: their keys, defaults and candidates, one way for all. Imports kernels when asked."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from biphase.kernels.gpu.launch import launching_instead
from biphase.kernels.gpu.target import Target, compiling_for
from biphase.kernels.gpu.tuning import Settings, answering

Choice = Callable[[Target, str], Settings]
Choices = Callable[[Target, str], list[Settings]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TunedOp:
    """``name`` is the table's, ``folder`` the one of kernels/ whose variants ask for it."""

    name: str
    folder: str
    default: Choice
    candidates: Choices


_MODULES = {
    "decode_attention": "decode_attention.workspace",
    "kv_pack": "kv_pack.triton_gpu",
    "moe_product": "moe.settings",
    "rms_norm": "rms_norm.triton_gpu",
    "rope_and_cache": "rope_and_cache.triton_gpu",
    "silu_mul": "silu_mul.triton_gpu",
}


def tuned_ops() -> dict[str, TunedOp]:
    found = [_prefill_attention(), _sample()]
    for name, path in _MODULES.items():
        module = importlib.import_module(f"biphase.kernels.{path}")
        folder = path.split(".")[0]
        found.append(TunedOp(name=name, folder=folder, default=module.default_settings, candidates=module.candidates))
    return {op.name: op for op in sorted(found, key=lambda op: op.name)}


def defaults(target: Target) -> dict[str, dict[str, Settings]]:
    """op -> key -> the op's own settings, for each key that a production variant asks for on ``target``."""
    return {
        op.name: {key: op.default(target, key) for key in sorted(variant_keys(op, target))}
        for op in tuned_ops().values()
    }


def variant_keys(op: TunedOp, target: Target) -> set[str]:
    keys: set[str] = set()
    with compiling_for(target), launching_instead(lambda *_: None), recording(op.name, keys):
        for variant in importlib.import_module(f"biphase.kernels.{op.folder}.variants").variants():
            if variant.min_capability <= target.capability:
                variant.run()
    return keys


@contextmanager
def recording(op: str, keys: set[str]) -> Iterator[None]:
    """Within it launchers find no table, and the keys that they ask for of ``op`` are added to ``keys``."""

    def answer(asked: str, _: Target, key: str) -> None:
        if asked == op:
            keys.add(key)

    with answering(answer):
        yield


def trying(op: str, key: str, settings: Settings) -> Any:
    """A context in which launchers find ``settings`` for ``key`` of ``op``, and nothing else."""
    return answering(lambda asked, _, asked_key: settings if (asked, asked_key) == (op, key) else None)


def _prefill_attention() -> TunedOp:
    import torch

    from biphase.kernels.prefill_attention import settings

    def shape(key: str) -> settings.PrefillShape:
        dtype, dim, block = key.split("-")
        kv_dtype = {"f32": torch.float32, "fp8": torch.float8_e4m3fn, "16bit": torch.bfloat16}[dtype]
        return settings.PrefillShape(head_dim=int(dim[1:]), block_size=int(block[1:]), kv_dtype=kv_dtype)

    return TunedOp(
        name=settings.OP,
        folder="prefill_attention",
        default=lambda target, key: settings.default(target, shape(key)),
        candidates=lambda target, key: settings.candidates(target, shape(key)),
    )


def _sample() -> TunedOp:
    from biphase.kernels.sample import triton_gpu

    return TunedOp(
        name=triton_gpu.OP,
        folder="sample",
        default=lambda target, key: triton_gpu.default(target, int(key[1:])),
        candidates=triton_gpu.candidates,
    )
