"""Formulas of the documentation as MathML, which browsers draw by themselves; a hook of MkDocs.

So neither building the site nor reading it needs a script from elsewhere. GitHub draws the same `$$...$$` by its own
means.
"""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<div class="arithmatex">\\\[(?P<block>.*?)\\\]</div>|<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>',
    flags=re.DOTALL,
)


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Called by MkDocs for each page, after it was rendered."""
    return _FORMULA.sub(_mathml, html)


def _mathml(formula: re.Match[str]) -> str:
    if formula["block"] is not None:
        return f"<p>{convert(unescape(formula['block']).strip(), display='block')}</p>"
    return convert(unescape(formula["inline"]).strip())
