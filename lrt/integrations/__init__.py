"""Other projects' tools: transformers, lm-eval, nanochat."""
