"""Payloads through memory that both processes of a host have mapped."""
