"""Proven ranges of a branch over boxes of its parameters: interval arithmetic and rules for programs."""
