"""Makes Triton's interpreter (3.6 to 3.9) compute on bfloat16 and fp8 as a GPU does, so that kernels run their true path.

As it comes it holds both as raw unsigned integers and computes on those, cuts float32 off instead of rounding it to
bfloat16, and rounds fp8 wrongly (-31.96 becomes -16). With the patch, values stay raw bits in memory; every operation
decodes them to float32, computes there, and rounds its result to nearest even. Products of float32 that do not state
``input_precision`` are rounded to tf32 on the way in, as a GPU does. An e4m3 cast past 448 gives NaN, as torch's does (a
GPU saturates): a kernel that forgets to clamp is found. What was needlessly slow is vectorised.

``patch_interpreter`` does nothing on a GPU, and nothing the second time.
"""

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter

from support import triton_interpreter_ops as ops
from support.float_bits import PACKED, decode, encode, round_to_tf32

TensorHandle = interpreter.TensorHandle
_ir = interpreter._ir

_patched = False
_languages_patched: set[str] = set()
_languages_seen: dict[Any, frozenset[str]] = {}


def patch_interpreter() -> None:
    global _patched
    if _patched or not triton.knobs.runtime.interpret:
        return
    _patched = True
    interpreter._convert_float = _convert_float
    _patch_builder(interpreter.InterpreterBuilder)
    # each integer sum would be computed again in int64, for an assertion that only debug mode makes
    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(sanitize_overflow=False)
    interpreter.ReduceOps.generic_reduce = ops.generic_reduce
    interpreter.ScanOps.generic_scan = ops.generic_scan
    interpreter.GridExecutor._restore_args_dev = _nothing_to_restore
    interpreter.GridExecutor.__call__ = _quietly(interpreter.GridExecutor.__call__)
    interpreter._patch_lang = _once_per_launch(interpreter._patch_lang)
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)


def _patch_builder(builder: Any) -> None:
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _fp_to_fp
    builder.binary_op = _binary
    builder.unary_op = _unary
    builder.create_fma = _fma(builder.create_fma)
    builder.create_clampf = _clamp
    builder.create_dot = _dot
    builder.create_umulhi = ops.umulhi
    builder.create_erf = ops.erf
    # NaN loses against a number, as in fminnum; 3.6 kept it
    builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)
    builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    # missing or broken in 3.6
    builder.get_bf16 = lambda self, value: TensorHandle(encode(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)
    builder.get_all_ones_value = ops.all_ones


def _values(handle: Any) -> np.ndarray:
    return decode(handle.data, handle.dtype.scalar) if handle.dtype.scalar in PACKED else handle.data


def _handle(values: np.ndarray, dtype: Any) -> Any:
    """``values`` computed in float32 where ``dtype`` is held as bits."""
    if values.dtype == np.bool_:
        return TensorHandle(values, tl.int1)  # a comparison's; with its operands' type a splat would widen it
    if dtype in PACKED:
        values = encode(values, dtype)
    elif not interpreter._validate_np_data_size(values, dtype):
        values = values.astype(interpreter._get_np_dtype(dtype))
    return TensorHandle(values, dtype)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    target = dst_type.scalar
    values = _values(src)
    if target in PACKED:
        return TensorHandle(encode(values, target), target)
    return TensorHandle(values.astype(interpreter._get_np_dtype(dst_type)), target)


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if rounding_mode == _ir.ROUNDING_MODE.RTZ:
        raise NotImplementedError("rounding towards zero")
    return _cast(self, src, dst_type)


def _convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """The interpreter's own signature: bits in, bits out."""
    raw = {16: np.uint16, 32: np.uint32, 64: np.uint64}
    values = decode(data, source) if source in PACKED else data.view(interpreter._get_np_dtype(source))
    if target in PACKED:
        return encode(values, target)
    return values.astype(interpreter._get_np_dtype(target)).view(raw[target.primitive_bitwidth])


def _binary(self: Any, lhs: Any, rhs: Any, op: Callable[..., np.ndarray]) -> Any:
    dtype = lhs.dtype.scalar
    if lhs.data.dtype == np.bool_ and rhs.data.dtype == np.bool_:
        # one-bit integers that wrap around
        return TensorHandle((op(lhs.data.astype(np.int8), rhs.data.astype(np.int8)) & 1).astype(np.bool_), dtype)
    if dtype in PACKED and op in ops.BITWISE:
        return TensorHandle(op(lhs.data, rhs.data), dtype)
    return _handle(op(_values(lhs), _values(rhs)), dtype)


def _unary(self: Any, arg: Any, op: Callable[..., np.ndarray]) -> Any:
    return _handle(op(_values(arg)), arg.dtype.scalar)


def _clamp(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
    values = np.fmin(np.fmax(_values(arg), _values(lo)), _values(hi))
    if propagate_nans != _ir.PROPAGATE_NAN.NONE:
        values = np.where(np.isnan(_values(arg)), np.float32(np.nan), values).astype(values.dtype)
    return _handle(values, arg.dtype.scalar)


def _fma(before: Callable[..., Any]) -> Callable[..., Any]:
    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar not in PACKED:
            return before(self, x, y, z)
        exact = _values(x).astype(np.float64) * _values(y) + _values(z)
        return _handle(exact.astype(np.float32), z.dtype.scalar)

    return create_fma


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    left, right, accumulator = _values(a), _values(b), _values(d)
    if accumulator.dtype == np.float32:
        if a.dtype.scalar == tl.float32 and input_precision == _ir.INPUT_PRECISION.TF32:
            left, right = round_to_tf32(left), round_to_tf32(right)
        left, right = left.astype(np.float32, copy=False), right.astype(np.float32, copy=False)
        return TensorHandle(np.matmul(left, right) + accumulator, d.dtype.scalar)
    return _handle(np.matmul(left, right, dtype=accumulator.dtype) + accumulator, d.dtype.scalar)


def _nothing_to_restore(self: Any, args_dev: Any, args_hst: Any, kwargs: Any, kwargs_hst: Any) -> None:
    """Tensors on the CPU are not copied for the kernel, so nothing comes back (a pool would be copied onto itself)."""


def _quietly(call: Callable[..., Any]) -> Callable[..., Any]:
    """A GPU does not warn: inf - inf and the like are the kernel's own business."""

    @functools.wraps(call)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _languages_patched.clear()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return call(*args, **kwargs)

    return wrapper


def _once_per_launch(patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    """Each call of a device function patched the whole language anew."""

    @functools.wraps(patch_lang)
    def wrapper(fn: Any) -> Any:
        seen = _languages(fn.__code__, fn.__globals__)
        if seen <= _languages_patched:
            return interpreter._LangPatchScope()
        _languages_patched.update(seen)
        return patch_lang(fn)

    return wrapper


def _languages(code: Any, names: dict[str, Any]) -> frozenset[str]:
    """Which of ``triton.language`` and its core the module of a function sees."""
    if code not in _languages_seen:
        modules = [value for value in names.values() if inspect.ismodule(value)]
        _languages_seen[code] = frozenset(module.__name__ for module in modules if module in (tl, tl.core))
    return _languages_seen[code]


def _with_index(patch_tensor: Callable[..., Any]) -> Callable[..., Any]:
    """numpy deprecates the conversion of one-element arrays that 3.6 uses."""

    def wrapper(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return wrapper
