"""A Linear (or embedding) and a slice go in; a layer comes out that trains only this slice.

A `Slice` says which rows or columns of the base weight are kept, and which of them are trained.
"""
