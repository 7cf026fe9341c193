"""A training run: configuration, optimisers, steps, snapshots, scores on the way."""
