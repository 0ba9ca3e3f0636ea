"""The prefill phase: scheduler, worker, service."""
