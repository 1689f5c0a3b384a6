"""An evaluation reads everything it needs before the first model runs."""

from __future__ import annotations

import shutil

import pytest

from surgery.cli.main import main


@pytest.mark.parametrize("content", ["this is not JSON", '{"format": "surgery/1", "method": 3}', '{"format": "surgery/1"}', "[]"])
def test_a_damaged_record_stops_the_evaluation_before_it_begins(tiny_checkpoint, tmp_path, capsys, content):  # type: ignore[no-untyped-def]
    first = tiny_checkpoint("llama")
    second = shutil.copytree(first, tmp_path / "cut")
    (second / "surgery.json").write_text(content)
    # A model whose weights cannot be read would stop the evaluation too, if it were loaded first.
    broken = shutil.copytree(first, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "text.txt").write_text("Some text to measure.\n" * 40)
    arguments = ["eval", str(broken), str(second), "--data", str(tmp_path / "text.txt"), "--seq-len", "32"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "surgery.json is damaged" in error
    assert "cut the model again" in error
    # The record of a restored model is of another format, and says nothing about a cut.
    (second / "surgery.json").write_text('{"format": "surgery-restore/1"}')
    assert main([arguments[0], str(first), *arguments[2:]]) == 0
