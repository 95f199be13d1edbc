"""A model goes in; its units (heads, neurons, rows, tokens) come out, with their weights and costs."""
