"""Moving KV between instances: tickets, pieces, digests, the pull."""
