"""What a notebook shows of an atlas: short, and harmless whatever the file says."""

from __future__ import annotations

import dataclasses

import pytest

import chanfmt
from chanfmt.format.show import ffns_text, short, units_text
from chanfmt.format.writer import write_atlas
from tests.support.factory import moe_atlas, moe_content, random_atlas, random_content

HOSTILE = "<script>alert(1)</script>&\x1b]0;owned\x07\x9b31m\u202e\n" + "x" * 5000


def test_a_dense_atlas(tmp_path):
    with chanfmt.open(random_atlas(tmp_path / "a.h5", channels=1200)) as atlas:
        assert repr(atlas) == f"<Atlas 'a.h5': {atlas.model.id.rpartition('/')[2]}, 4 FFNs x 1,200>"
        assert repr(atlas.stacks["decoder"]) == "<Stack 'decoder': dense, 4 FFNs x 1,200>"
        assert repr(atlas.blocks[2]) == f"<Block 2: layer 2, '{atlas.blocks[2].module}', 1,200 channels>"
        assert repr(list(atlas.units())[2]) == "<Unit: layer 2 of 'decoder', 1,200 channels>"
        content = atlas.content()
    assert repr(content) == repr(atlas).replace("Atlas 'a.h5'", "AtlasContent")


def test_experts_and_several_widths(tmp_path):
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as atlas:
        assert repr(atlas).endswith(", 3 FFNs x 4 experts x 24, 1 FFN x 96>")
        assert repr(atlas.stacks["decoder.experts"]) == "<Stack 'decoder.experts': experts, 3 FFNs x 4 experts x 24>"
        assert "4 experts x 24 channels>" in repr(atlas.blocks[1])
        assert repr(list(atlas.units())[2]) == "<Unit: layer 1, expert 1 of 'decoder.experts', 24 channels>"


def test_shapes():
    assert units_text((8,)) == "8"
    assert ffns_text([(8192,)] * 2 + [(14336,)] * 3) == "3 FFNs x 14,336, 2 FFNs x 8,192"
    assert ffns_text((width,) for width in range(100)).endswith("3, 96 FFNs of other widths")
    assert ffns_text([]) == "no FFNs"


def test_an_unfinished_build_says_so(tmp_path):
    content = dataclasses.replace(random_content(), status="partial")
    write_atlas(content, tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert repr(atlas).endswith("4 FFNs x 96, partial>")
        assert "(partial)" in atlas._repr_html_()
    assert repr(content).endswith(", partial>")


def test_html(tmp_path):
    with chanfmt.open(random_atlas(tmp_path / "a.h5")) as atlas:
        page = atlas._repr_html_()
    for text in ("Importance atlas a.h5", atlas.model.id, "16 x 32 tokens of", "4 FFNs x 96", "layers 0 to 3"):
        assert text in page, text
    # The calibration was read before; an atlas that is closed earlier still has something to show.
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        pass
    assert "cannot be read" in atlas._repr_html_()


@pytest.mark.parametrize("make", [random_content, moe_content])
def test_hostile_names(tmp_path, make):
    content = make()
    blocks = tuple(dataclasses.replace(block, module=HOSTILE) for block in content.blocks)
    model = dataclasses.replace(content.model, id=HOSTILE, revision=HOSTILE, model_type=HOSTILE)
    rows = tuple(dataclasses.replace(row, source=HOSTILE) for row in content.calibration.contributions)
    calibration = dataclasses.replace(content.calibration, contributions=rows)
    content = dataclasses.replace(content, model=model, blocks=blocks, calibration=calibration)
    path = tmp_path / "<b>\x1b[31m.h5"
    write_atlas(content, path)
    with chanfmt.open(path) as atlas:
        lines = [repr(item) for item in (atlas, content, *atlas.stacks.values(), *atlas.blocks, *atlas.units())]
        page = atlas._repr_html_()
    for line in lines:
        assert line.isprintable(), line
        assert len(line) < 250
    assert len(page) < 4000
    assert page.replace("\ufffd", "").isprintable()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


def test_short():
    assert short("a" * 50 + "b" * 50, 10) == "aaaa...bbb"
    assert short("a\nb\tc") == "a b\ufffdc"
