"""The model: its configuration, blocks, memory and State, and the checkpoints that keep it."""
