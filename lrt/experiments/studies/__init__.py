"""Studies: grids of runs from a small declarative file, resumable cell by cell; results are JSON lines."""
