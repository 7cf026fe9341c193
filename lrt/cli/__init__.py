"""The command line: a file per verb, and the only room that knows tyro."""
