"""PEFT's shape: a config and a model go in; a wrapped model comes out that trains, saves, loads and merges."""
