"""What quantities are called for people: the one place where a key becomes words. JSON keeps the keys."""

from __future__ import annotations

NAMES = {
    "live_bpb": "live BPB",
    "parallel_bpb": "parallel BPB",
    "gap": "gap",
    "interval": "95 % interval",
    "schedule": "schedule",
    "live_bpb_memory_zero": "memory zeroed",
    "live_bpb_memory_embedding": "previous embedding",
    "live_bpb_memory_shuffled": "memory of another row",
    "live_bpb_memory_delayed_1": "memory 1 token older",
    "live_bpb_memory_delayed_8": "memory 8 tokens older",
    "live_bpb_memory_frozen": "memory frozen",
    "live_bpb_two_forwards": "two forwards",
    "targets": "tokens scored",
    "bytes": "bytes scored",
    "complete": "whole split",
    "corpora": "texts",
}
"""Key of `Metrics`, or of a result -> its name in tables. BPB is bits per byte."""
KINDS = {
    "scores": "Scores",
    "bpb": "Bits per byte",
    "bfloat16": "Bits per byte in bfloat16",
    "sweeps": "Sweep curve",
    "hops": "How many hops the state survives",
    "ablations": "The memory replaced at test time",
    "memory": "Inside the memory",
    "text": "What recurrence gains, token by token",
    "probe": "What a linear probe reads of the state",
    "core": "CORE",
}
"""Kind of result -> its title."""
OF_MEMORY = "live_bpb_memory_"
"""How the key of an ablation begins, which users may register too."""


def name_of(key: str) -> str:
    """A key in words; of an ablation that a user registered, "memory" and its name."""
    if key in NAMES:
        return NAMES[key]
    return f"memory {key.removeprefix(OF_MEMORY).replace('_', ' ')}" if key.startswith(OF_MEMORY) else key


def ablation_name(key: str) -> str:
    """What the memory is replaced with; "live" where it is not."""
    return "live" if key == "live_bpb" else name_of(key)
