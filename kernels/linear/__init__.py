"""Matrix product of the dense layers: ``y_ON = w_OI @ x_IN``, activations feature-major."""

from biphase.kernels.linear.reference import linear_reference
from biphase.kernels.linear.torch_cpu import linear, linear_add, linear_logits, padded_tokens

__all__ = ["linear", "linear_add", "linear_logits", "linear_reference", "padded_tokens"]
