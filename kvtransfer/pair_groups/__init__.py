"""Payloads over pair groups of torch.distributed, nccl on GPUs and gloo on the CPU. Imports torch; nothing else of
kvtransfer imports this."""
