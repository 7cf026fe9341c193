"""How a model is run token by token: prefill, decoding, sampling, sessions, the engine."""
