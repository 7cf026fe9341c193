"""Data with state: rows that real programs make, with the least that a reader who knows the state would pay."""
