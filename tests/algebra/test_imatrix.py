"""The importance matrix: read back by llama.cpp's own package, name by name and number by number."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.imatrix import imatrix_entries
from chanfmt.base.errors import AtlasError
from chanfmt.cli.main import main
from chanfmt.format.writer import write_atlas
from tests.support.factory import moe_content, random_content

gguf = pytest.importorskip("gguf")


def as_type(content, model_type):
    """``content`` as the atlas of a model of another type."""
    config = json.dumps({"model_type": model_type})
    return dataclasses.replace(content, model=dataclasses.replace(content.model, config=config))


def written(tmp_path, content):
    write_atlas(content, tmp_path / "a.h5")
    assert main(["export", str(tmp_path / "a.h5"), "-o", str(tmp_path / "a.imatrix.gguf")]) == 0
    return gguf.GGUFReader(tmp_path / "a.imatrix.gguf")


def test_what_another_reader_finds(tmp_path):
    content = as_type(random_content(), "llama")
    reader = written(tmp_path, content)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert fields["general.type"] == "imatrix"
    assert "general.architecture" not in fields
    record = content.calibration
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (record.sequences, record.seq_len)
    assert fields["imatrix.datasets"] == [row.source for row in record.contributions]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert sorted(tensors) == sorted(
        f"blk.{layer}.ffn_down.weight.{part}" for layer in range(4) for part in ("in_sum2", "counts")
    )
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        for layer in range(4):
            sums, counts = (tensors[f"blk.{layer}.ffn_down.weight.{part}"] for part in ("in_sum2", "counts"))
            # llama.cpp counts dimensions from the fastest: inputs, then matrices.
            assert (sums.shape.tolist(), counts.shape.tolist()) == ([96, 1], [1, 1])
            power = sums.data.reshape(-1) / counts.data.reshape(-1)
            np.testing.assert_allclose(power, atlas.stacks["decoder"]["activation_power"][layer], rtol=1e-6)


def test_experts_are_matrices_of_one_entry(tmp_path):
    content = as_type(moe_content(), "deepseek_v3")
    tensors = {tensor.name: tensor for tensor in written(tmp_path, content).tensors}
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        experts = [block for block in atlas.blocks if block.n_experts]
        assert experts
        for block in experts:
            stack = atlas.stacks[block.stack]
            name = f"blk.{block.layer_index}.ffn_down_exps.weight"
            sums, counts = tensors[f"{name}.in_sum2"].data, tensors[f"{name}.counts"].data
            np.testing.assert_array_equal(sums, stack.row("sum_u2", block.row).astype(np.float32))
            np.testing.assert_array_equal(counts.ravel(), stack.row("tokens", block.row).astype(np.float32))


def test_what_llama_cpp_does_not_know_is_refused_by_name(tmp_path, capsys):
    write_atlas(as_type(random_content(), "nonesuch"), tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas, pytest.raises(AtlasError, match="does not know the model type nonesuch"):
        list(imatrix_entries(atlas))
    assert main(["export", str(tmp_path / "a.h5"), "-o", str(tmp_path / "x.gguf")]) == 2
    assert not (tmp_path / "x.gguf").exists()
    assert main(["export", str(tmp_path / "a.h5"), "-o", str(tmp_path / "x.gguf"), "--metrics", "lp"]) == 2
    assert "--metrics has no effect" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_atlas(as_type(random_content(channels=4000), "llama"), tmp_path / "a.h5")
    target = tmp_path / "a.gguf"
    target.write_text("old")
    script = (
        "import resource, signal, sys; from chanfmt.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(main(['export', sys.argv[1], '-o', sys.argv[2], '--overwrite']))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a.h5"), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert target.read_text() == "old"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.gguf", "a.h5"]
