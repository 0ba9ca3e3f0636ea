"""The GPU's step runs in Triton's interpreter where there is no GPU."""

from support.triton_interpreter import patch_interpreter

patch_interpreter()
