"""Payloads read out of the source's staging slots by NIXL, over whatever network its UCX finds. An optional extra."""
