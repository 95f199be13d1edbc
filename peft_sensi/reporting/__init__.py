"""A plan or a saved adapter goes in; facts, tables for a terminal, model cards and uploads to the Hub come out."""
