"""Processes that train one model together: one, DDP or FSDP2. Any module will do that names its `shard_units`."""
