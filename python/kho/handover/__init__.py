"""Handovers as a whole: making one, what is in it, whose each page is, checking it, changing its ABI, comparing two."""
