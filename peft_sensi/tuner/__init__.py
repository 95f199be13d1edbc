"""A config and a base model go in; a wrapped model comes out that PEFT can train, save, load and merge."""
