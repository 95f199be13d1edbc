"""A Linear (or embedding) and a slice go in; a layer of which only that slice is trained comes out."""
