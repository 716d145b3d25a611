"""Links of the documentation to files outside of docs/, as the site shows them; a hook of MkDocs.

On GitHub such a link is relative and leads to the file. The site has no such file, so there it leads to the repository
(`repo_url` in mkdocs.yml), or, as long as that is not set, is the path of the file as code.
"""

import re
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

ROOT = Path(__file__).parents[1]
DOCS = "docs"
BRANCH = "main"

_FENCED = re.compile(r"(^```.*?^```[^\n]*$)", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:  # noqa: ARG001
    """Called by MkDocs for each page, before it is rendered."""
    return site_links(markdown, page=page.file.src_uri, repo_url=config.repo_url)


def site_links(markdown: str, *, page: str, repo_url: str | None) -> str:
    """The page's text with links out of docs/ rewritten; `page` is its path inside of docs/."""

    def rewritten(link: re.Match[str]) -> str:
        path = normpath(join(DOCS, dirname(page), link["target"]))
        is_outside = "://" not in link["target"] and not path.startswith(f"{DOCS}/")
        if not is_outside or not (ROOT / path).exists():  # what is nowhere is left for MkDocs to complain of
            return link[0]
        if repo_url:
            return f"[{link['text']}]({repo_url.rstrip('/')}/blob/{BRANCH}/{path}{link['anchor'] or ''})"
        says_the_path = link["text"].strip("`") in path
        return f"`{path}`" if says_the_path else f"{link['text']} (`{path}`)"

    # Every second part is a block of code.
    parts = _FENCED.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(rewritten, part) for index, part in enumerate(parts))
