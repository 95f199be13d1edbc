"""Scores and a budget go in; a plan comes out: which units are tuned, frozen or trimmed, and refitted values."""
