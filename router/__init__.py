"""The front door: tokenizer, queue, dispatch, request lifecycle. Never imports torch."""
