"""A model goes in. Its units (heads, neurons, rows, tokens) come out, with their weights and costs."""
