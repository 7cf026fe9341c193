"""The old name of `lrt.integrations.hf`, which exported folders without code of their own tell people to import.

It stays for one release.
"""

from lrt.integrations.hf import *  # noqa: F403
