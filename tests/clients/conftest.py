"""The option of `make clients`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", action="store_true", help="write what the clients send into tests/serve/clients")
