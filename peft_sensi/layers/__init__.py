"""A Linear (or embedding) and a slice go in; a layer that trains only that slice comes out."""
