"""Scores and a budget go in; a plan comes out, which says which units are tuned, frozen or trimmed.

The *refit* then computes better weights for the units that are kept.
"""
