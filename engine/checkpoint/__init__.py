"""Model files into tensors: any supported checkpoint, converted once (opening.py), mapped by every worker of a host.

Empty: what reads a model's configuration alone, as `biphase serve` does before it starts anything, needs no torch.
"""
