"""Theorem 1, computed and certified: value functions of one branch, and the duality gap for any number of branches."""
