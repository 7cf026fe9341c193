"""What is measured of a model: live and parallel scores, ablations, curves, CORE; and results, kept and shown."""
