"""Hooks of mkdocs: pages from outside docs/, and links that work in the repository and on the site.

A page is written as GitHub reads it. There, a pipe inside code in a table is escaped; Python-Markdown would show the escape.

A link in a page is relative to the page's place in the repository, as GitHub needs it. On the site, a link to another
page of the site leads to that page. A link to any other file of the repository leads to the file at `repo_url`.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# Pages outside docs/. They have the same path on the site.
OUTSIDE = [
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "spec").glob("*.md"))),
]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
CODE_IN_TABLE = re.compile(r"(?<=[| ])`[^`\n]*\\\|[^`\n]*`(?=.*\|$)", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages outside docs/ to the site."""
    for path in OUTSIDE:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files, **_: Any) -> str:
    """Map the links of one page, except those inside blocks of code."""
    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [mapped(markdown[end : fence.start()], page.file.src_uri, config.repo_url, files), fence.group()]
        end = fence.end()
    return "".join([*parts, mapped(markdown[end:], page.file.src_uri, config.repo_url, files)])


def mapped(text: str, page: str, repo_url: str, files: Files) -> str:
    """The text of a page with its links as the site needs them. ``page`` is the page's path on the site."""
    folder = posixpath.dirname(page if page in OUTSIDE else f"docs/{page}")

    def replace(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        on_site = target if target in OUTSIDE else target.removeprefix("docs/")
        if (target in OUTSIDE or target.startswith("docs/")) and files.get_file_from_path(on_site):
            return posixpath.relpath(on_site, posixpath.dirname(page) or ".") + (link["anchor"] or "")
        if not (ROOT / target).exists():
            return link.group()  # mkdocs warns of this link.
        kind = "tree" if (ROOT / target).is_dir() else "blob"
        return f"{repo_url.rstrip('/')}/{kind}/main/{target}{link['anchor'] or ''}"

    text = CODE_IN_TABLE.sub(lambda code: code.group().replace("\\|", "|"), text)
    return LINK.sub(replace, text)
