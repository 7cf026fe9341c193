"""Fine-tune any causal language model of transformers, LRTs and retrofitted ones among them, through TRL and PEFT."""
