"""Roles of docstrings, ``:class:`` and the like, are for who reads the code: pages go without."""

import re

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):(?=<code)")


def on_page_content(html: str, **_: object) -> str:
    """Take the roles out of a page."""
    return _ROLE.sub("", html)
