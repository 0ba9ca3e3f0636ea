"""Ranks as one instance: the channel between rank 0 and the others, what travels on it, and how they start and end."""
