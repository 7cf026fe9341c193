"""Processes that train one model together; none knows which model."""
