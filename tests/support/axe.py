"""What axe-core finds wrong with a page for those who do not see it, or use no mouse."""

from __future__ import annotations

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

GRAVE = {"serious", "critical"}


def serious_findings(page: Page) -> list[str]:
    """Rules that are broken seriously, each with the first elements that break it."""
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes'][:3]]}"
        for one in Axe().run(page).response["violations"]
        if one["impact"] in GRAVE
    ]
