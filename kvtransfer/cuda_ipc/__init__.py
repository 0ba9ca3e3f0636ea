"""Payloads from one GPU of a host to another's process by CUDA IPC. Imports torch; nothing else of kvtransfer imports this."""
