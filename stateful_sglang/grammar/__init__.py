"""Constraints on an answer: from a schema as found in the wild to one that a grammar can follow."""
