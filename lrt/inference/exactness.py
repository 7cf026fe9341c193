"""How exact a row is, as a number: may another request go on from it (docs/contract.md, section 7)?

Whatever is computed after an inexact position is no more exact than that position. So a row, a fork of it and a session
carry the certificate of the least exact part of their text.
"""

from __future__ import annotations

import dataclasses
import math

from lrt.inference.certificate import Certificate
from lrt.inference.prefill import PrefillMode, tolerance
from lrt.model.transformer import LatentRecurrentTransformer


def error_bound(certificate: Certificate | None) -> float:
    """The smallest tolerance that a row and every beginning of it are within; of a row without certificate 0: exact."""
    return 0.0 if certificate is None else certificate.bound


def asked_bound(mode: PrefillMode, model: LatentRecurrentTransformer) -> float:
    """The largest error that a prompt of this mode may start from: 0 where exact, infinity where any will do."""
    if mode == "exact":
        return 0.0
    limit = tolerance(mode, model)
    return math.inf if limit is None else limit


def least_exact(before: Certificate | None, after: Certificate | None, tokens: int) -> Certificate | None:
    """The certificate of a text of so many tokens whose beginning has one and whose rest has another; None is exact.

    Of equals the later one. Says nothing of how long the beginning was: that may be another client's text.
    """
    if error_bound(before) <= error_bound(after):
        return after
    assert before is not None
    return dataclasses.replace(before, tokens=tokens)
