"""Model files into tensors: any supported checkpoint, converted once, mapped by every worker of a host."""

from biphase.engine.checkpoint.opening import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
