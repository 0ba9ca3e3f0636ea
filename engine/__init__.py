"""What both phases share: model, weights, paged KV cache, block pool, sampler, step runner."""
