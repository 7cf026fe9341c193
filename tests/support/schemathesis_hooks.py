"""What `schemathesis run` loads: most requests name the model that is there, else nearly all of them would be a 404."""

from __future__ import annotations

from typing import Any

import schemathesis


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    body = case.body
    if isinstance(body, dict) and isinstance(body.get("model"), str) and 0 < len(body["model"]) <= 200:
        body["model"] = "lrt"
