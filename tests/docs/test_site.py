"""The documentation site builds without a warning; its links lead to pages of the site, or to files of the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="mkdocs-material is not installed")

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "spec").glob("*.md")]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return path


def test_every_page_is_there(site: Path) -> None:
    built = {path.relative_to(site).with_suffix(".md").as_posix() for path in site.rglob("*.html")}
    docs = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} | {"index.md"}
    spec = {f"spec/{path.name}" for path in (ROOT / "spec").glob("*.md")}
    assert built == docs | spec | {"404.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASING.md", "SECURITY.md"}


def test_links_out_of_the_documentation_lead_somewhere(site: Path) -> None:
    found = set()
    for page in site.rglob("*.html"):
        for kind, path in re.findall(
            r'href="https://github\.com/chanfmt/chanfmt/(blob|tree)/main/([^"#]+)', page.read_text("utf-8")
        ):
            assert (ROOT / path).is_dir() if kind == "tree" else (ROOT / path).is_file(), (page.name, path)
            found.add(path)
    assert {"spec/conformance", "spec/atlas-1.0.json", "bench/results/recovery-2026-11-24.txt"} <= found
    assert 'href="spec/atlas-1.0.html"' in (site / "format.html").read_text("utf-8")


def test_nothing_is_loaded_from_another_server(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="([^"]+)"', text)
        loaded += re.findall(r'<link[^>]*\brel="(?:stylesheet|preconnect|icon)"[^>]*\bhref="([^"]+)"', text)
        assert loaded
        assert not [address for address in loaded if "//" in address], page.name


def test_a_pipe_in_code_in_a_table_is_shown_as_a_pipe(site: Path) -> None:
    assert "<code>rank&lt;200 | halo</code>" in (site / "browsing.html").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_holds_the_marks_of_a_merge(page: Path) -> None:
    assert not re.search(r"^(<{7} .*|={7}|>{7} .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
