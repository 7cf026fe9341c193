"""Benchmarks: ratios of alternated runs on one machine, never bare seconds (`lrt bench`)."""
