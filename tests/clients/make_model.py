"""The checkpoint that the clients talk to, and its tokenizer for those that want one. Runs in .venv."""

from __future__ import annotations

import sys
from pathlib import Path

from support.server import CHATML, saved

from lrt.integrations.hf.export import wrap_tokenizer
from lrt.model import checkpoint

folder = Path(sys.argv[1])
saved(folder / "lrt", *CHATML, context=2048)
_, tokenizer = checkpoint.load(folder / "lrt")
fast = wrap_tokenizer(tokenizer, 2048)
fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
fast.save_pretrained(folder / "tokenizer")
