"""Deciding how many instances of which role there should be, and which of them are to be left out. Without effects."""
