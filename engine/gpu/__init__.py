"""The step on a GPU: token-major activations, Triton kernels, CUDA graphs, steps that overlap."""
