"""`lrt serve`: OpenAI's HTTP interface over the continuous batch, and a page that shows what the memory does.

One thread per model and device owns an engine (`async_engine.py`); the event loop only carries text. A request's events
come back through a queue, and a client that disconnects frees its rows before the next token. Models come and go while
requests run (`registry.py`).
"""
