"""The whole pipeline on a real 30-layer SwiGLU Llama."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import chanfmt
from chanfmt.building.measure import measure
from chanfmt.cli.main import main as atlas_command
from chanfmt.data.text import read_text
from chanfmt.data.tokens import pack, sample, tokenize
from chanfmt.format import schema
from chanfmt.format.records import NO_SPECIAL_TOKENS
from chanfmt.hub.locate import locate_model
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.load import load_model
from surgery.cli.main import main as surgery_command
from tests.support.direct import assert_metrics_close, direct, direct_sums, members
from tests.support.repeated import repeated

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), *repeated(("float32", 1e-3))])
def test_sums_equal_direct_computation(smollm2, dtype, tolerance):
    source = locate_model(str(smollm2))
    model = load_model(source, dtype=dtype)
    ffns = find_ffns(model)
    assert len(ffns) == 30
    assert {ffn.width for ffn in ffns} == {1536}
    blocks = pack(tokenize(source.tokenizer, read_text("pydoc", "calibrate")), 64, NO_SPECIAL_TOKENS, "pydoc")
    tokens = sample(blocks, 3, 0)
    found = measure(model, ffns, tokens, rho=0.01, batch_size=2)
    us, ss = direct(model, ffns, torch.from_numpy(tokens.ids).long())
    for ffn, (statistics,) in zip(ffns, members(found), strict=True):
        expected = direct_sums(us[ffn.write], ss[ffn.write])
        for name in ("sum_u2", "sum_s2", "sum_abs_q", "sum_q2"):
            assert_metrics_close(statistics.sums[name].numpy(), expected[name], tolerance)


@pytest.fixture(scope="module")
def atlas_path(smollm2, tmp_path_factory):
    path = tmp_path_factory.mktemp("smollm2") / "a.h5"
    build = ["build", str(smollm2), "-o", str(path), "--calib", "pydoc", "--sequences", "16", "--seq-len", "128"]
    assert atlas_command(build) == 0
    return path


@pytest.fixture
def surgery(capsys):
    """Runs a command line, and returns what it prints."""

    def run(*arguments):
        code = surgery_command([*map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return run


def test_atlas_is_plausible(atlas_path):
    with chanfmt.open(atlas_path, verify=True) as atlas:
        stack = atlas.stacks["decoder"]
        assert stack["lp"].shape == (30, 1536)
        assert ((stack["label"] == schema.LABEL_SUPERNODE).sum(axis=1) == 15).all()
        assert ((stack["label"] == schema.LABEL_HALO).sum(axis=1) == 152).all()
        assert (stack["core_covered"] > 0.3).all()
        assert 1.5 < atlas.calibration.mean_loss < 4.0
        real, null = stack["redundancy"], stack["redundancy_null"]
        # Related text correlates, and shuffled text does not; otherwise redundancy would mean nothing.
        assert np.median(real) > 1.5 * np.median(null)


def test_half_cut_generates_and_compares(smollm2, atlas_path, surgery, tmp_path):
    directories = {}
    for name, extra in {
        "scar-prot": [],
        "magnitude": [],
        "magnitude-protected": ["--protect", "supernodes"],
    }.items():
        directories[name] = tmp_path / name
        method = name.removesuffix("-protected")
        output = surgery(
            "prune",
            atlas_path,
            "--model",
            smollm2,
            "--sparsity",
            "0.5",
            "--method",
            method,
            *extra,
            "-o",
            directories[name],
            "--json",
        )
        report = json.loads(output)
        assert report["checks"]["logits"]["relative_error"] < 1e-4
        assert {layer["kept"] for layer in report["layers"]} == {768}
    script = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert model.config.intermediate_size == 768\n"
        "assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()\n"
        "ids = tokenizer('The Python language is', return_tensors='pt')\n"
        "print(tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", script, directories["scar-prot"]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The Python language is")
    result = json.loads(
        surgery("eval", smollm2, *directories.values(), "--data", "pydoc", "--max-tokens", "1024", "--seq-len", "512", "--json")
    )
    dense, scar, magnitude, protected = (model["perplexity"] for model in result["models"])
    assert dense < scar < protected < magnitude
    removed = [model["cut"]["supernodes_removed"] for model in result["models"][1:]]
    assert removed[0] == 0
    assert removed[1] > 150
    assert removed[2] == 0
