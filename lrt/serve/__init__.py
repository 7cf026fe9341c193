"""`lrt serve`: OpenAI's HTTP interface over the continuous batch, and a page that shows what the memory does.

One thread per model owns its engine (`worker`); the event loop only carries text. A request becomes `lrt.requests`, its
events come back through a queue, and whoever goes away frees its rows at once.
"""
