"""A plan, or a saved adapter, goes in; tables, facts, model cards and uploads come out."""
