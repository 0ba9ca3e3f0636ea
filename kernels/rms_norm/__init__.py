"""Root-mean-square normalisation over the features of each token."""

from biphase.kernels.rms_norm.reference import rms_norm_reference
from biphase.kernels.rms_norm.torch_cpu import rms_norm

__all__ = ["rms_norm", "rms_norm_reference"]
