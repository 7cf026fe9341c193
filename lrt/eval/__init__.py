"""What is measured of a model, and how results are kept and shown."""
