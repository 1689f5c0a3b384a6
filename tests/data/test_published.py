"""Data sets on the Hub, read without the package `datasets`: which files hold a split, their rows, the cache, what fails."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

import pyarrow
import pytest
from pyarrow import parquet

from chanfmt.base.errors import UsageError
from chanfmt.data.published import CONVERTED, chosen
from chanfmt.data.text import check_text
from tests.support.hub.client import environment, script

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.hub.server import Hub

# An entry of None in sys.modules is how Python marks a package that cannot be imported.
READ = """
import sys
sys.modules["datasets"] = None
from chanfmt.base.errors import ChanfmtError
from chanfmt.data import published
from chanfmt.data.text import read_text
published.LARGEST_DOWNLOAD = int(sys.argv[3])
try:
    found = read_text(sys.argv[1], sys.argv[2])
    print(found.source, len(found.documents), found.text, sep="|")
except ChanfmtError as error:
    print("error", error, sep="|")
"""


def table(rows: Sequence[str | None], column: str = "text") -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({column: pyarrow.array(rows, pyarrow.string())}), stream)
    return stream.getvalue()


def read(hub: Hub, home: Path, source: str, purpose: str = "calibrate", largest: int = 10**9, **changes: str) -> str:
    return str(script(READ, source, purpose, largest, env=environment(hub, home, **changes))).rstrip("\n")


def wikitext(hub: Hub) -> None:
    names = {
        "wikitext-103-raw-v1/train-00000-of-00001.parquet": ["no"],
        "wikitext-2-raw-v1/test-00000-of-00001.parquet": ["one line", "", "another"],
        "wikitext-2-raw-v1/train-00000-of-00002.parquet": ["first", None, " "],
        "wikitext-2-raw-v1/train-00001-of-00002.parquet": ["last"],
        "README.md": [],
    }
    hub.add_repo("Salesforce/wikitext", {name: table(rows) for name, rows in names.items()}, kind="dataset")


def test_the_default_text_needs_no_further_package(hub: Hub, tmp_path: Path) -> None:
    wikitext(hub)
    place = "Salesforce/wikitext/wikitext-2-raw-v1"
    assert read(hub, tmp_path / "home", "wikitext2") == f"{place}/train|0|first\n\nlast"
    assert read(hub, tmp_path / "home", "wikitext2", "evaluate") == f"{place}/test|0|one line\n\nanother"
    # What is in the cache is enough without a network.
    assert read(hub, tmp_path / "home", "wikitext2", HF_HUB_OFFLINE="1") == f"{place}/train|0|first\n\nlast"
    assert "cannot be read" in read(hub, tmp_path / "empty", "wikitext2", HF_HUB_OFFLINE="1")


def test_a_large_data_set_is_read_from_the_branch_of_the_hub(hub: Hub, tmp_path: Path) -> None:
    """As c4: compressed JSON in its own files, a part of it as parquet. The files are not downloaded whole."""
    repo = hub.add_repo("allenai/c4", {"en/c4-train.00000-of-01024.json.gz": b"x"}, kind="dataset")
    repo.refs[CONVERTED] = repo.refs["main"]
    hub.change(
        repo,
        {"en/partial-train/0000.parquet": table(["a document", "another"]), "en/validation/0000.parquet": table(["held out"])},
        revision=CONVERTED,
    )
    assert read(hub, tmp_path / "home", "c4", largest=10) == "allenai/c4/en/train|2|a document\n\nanother"
    assert not list((tmp_path / "home").rglob("*.parquet"))
    assert read(hub, tmp_path / "home", "c4", "evaluate") == "allenai/c4/en/validation|1|held out"
    assert list((tmp_path / "home").rglob("*.parquet"))


def test_what_cannot_be_read_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("ann/lines", {"data.csv": b"text\nx\n"}, kind="dataset")
    hub.add_repo("ann/words", {"data/train-0.parquet": table(["x"], column="words")}, kind="dataset")
    hub.add_repo("ann/broken", {"data/train-0.parquet": b"PAR1 not parquet"}, kind="dataset")
    assert "no parquet files of train" in read(hub, tmp_path / "home", "ann/lines")
    assert "pip install datasets" in read(hub, tmp_path / "home", "ann/lines")
    assert "has no column 'text'" in read(hub, tmp_path / "home", "ann/words")
    assert "no parquet files of validation" in read(hub, tmp_path / "home", "ann/words@validation")
    assert "ann/broken cannot be read" in read(hub, tmp_path / "home", "ann/broken")
    assert "cannot be read" in read(hub, tmp_path / "home", "ann/missing")


@pytest.mark.parametrize(
    ("names", "config", "split", "found"),
    [
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "", "train", [0]),
        (["train.parquet", "training.parquet", "test.parquet"], "", "train", [0]),
        (["default/train/0001.parquet", "default/train/0000.parquet"], "", "train", [1, 0]),
        (["en/partial-train/0000.parquet", "de/partial-train/0000.parquet"], "en", "train", [0]),
        # Two configurations, and none was named.
        (["en/train/0000.parquet", "de/train/0000.parquet"], "", "train", []),
        (["only/train/0000.parquet"], "", "train", [0]),
        (["en/train-0.json.gz", "en/test-0.parquet"], "en", "train", []),
        (["all/a.b/train-0.parquet", "all/axb/train-0.parquet"], "a.b", "train", [0]),
    ],
)
def test_files_of_a_split(names: list[str], config: str, split: str, found: list[int]) -> None:
    assert chosen(names, config, split) == [names[place] for place in found]


@pytest.mark.parametrize(("word", "meant"), [("pydok", "pydoc"), ("wikitext", "wikitext2"), ("Wikitext-2", "wikitext2")])
def test_a_misspelt_short_name_is_noticed_without_the_network(word: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"unknown text source '{word}'; did you mean {meant}"):
        check_text(word)
    for name in ("imdb", "ann/pydok", "wikitext:wikitext-103-raw-v1"):
        check_text(name)


def test_the_package_datasets_is_not_imported() -> None:
    assert "datasets" not in sys.modules
