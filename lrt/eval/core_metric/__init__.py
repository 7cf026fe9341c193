"""CORE: the 22 tasks of DCLM (arXiv 2406.11794), from nanochat's bundle; with recurrence on, off, and one sweep."""
