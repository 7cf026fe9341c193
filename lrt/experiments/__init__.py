"""What was built with the library: the demo, studies, benchmarks, state tracking."""
