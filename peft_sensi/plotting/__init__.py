"""Scores and states of units go in, as arrays; picture files come out. Needs matplotlib (the extra `plots`)."""
