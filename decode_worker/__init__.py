"""The decode phase: scheduler with local prefill, worker, service."""
