"""Seven files of one idea each; none knows a model."""
