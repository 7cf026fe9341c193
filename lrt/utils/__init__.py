"""What every room may use and what knows no model: devices, files, optional imports, progress, provenance, timing."""
