"""Build, prune, reload: the three commands on every architecture, on models made by transformers."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers

import chanfmt
from chanfmt.format import schema
from surgery.cli.main import main as surgery
from tests.support.hygiene import heavy_imports
from tests.support.tiny import CONFIGS, random_tokens, tiny_model, tiny_tokenizer

FRESH = """
import json, sys
import transformers
for directory in sys.argv[1:]:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("a channel", return_tensors="pt").input_ids
    made = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    print(json.dumps({
        "missing": sorted(info["missing_keys"]), "unexpected": sorted(info["unexpected_keys"]),
        "generated": made.shape[1] - ids.shape[1], "class": type(model).__module__.split(".")[0],
        "tied": head.weight.data_ptr() == embeddings.weight.data_ptr(), "expected": model.config.tie_word_embeddings,
    }))
"""


@pytest.fixture(scope="module")
def pruned(tiny_checkpoint, tiny_atlas, tmp_path_factory):
    """Function from a model type to its model cut by half, made once."""
    made = {}

    def get(model_type):
        if model_type not in made:
            output = tmp_path_factory.mktemp("pruned") / model_type
            code = surgery(
                [
                    "prune",
                    str(tiny_atlas(model_type)),
                    "--model",
                    str(tiny_checkpoint(model_type)),
                    "--sparsity",
                    "0.5",
                    "-o",
                    str(output),
                    "--quiet",
                ]
            )
            assert code == 0
            made[model_type] = output
        return made[model_type]

    return get


@pytest.mark.parametrize("model_type", CONFIGS)
def test_pruned_equals_masked_dense(model_type, tiny_checkpoint, tiny_atlas, pruned):
    from safetensors.numpy import load_file

    dense = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint(model_type)).eval()
    small = transformers.AutoModelForCausalLM.from_pretrained(pruned(model_type)).eval()
    kept = load_file(pruned(model_type) / "kept_channels.safetensors")
    with chanfmt.open(tiny_atlas(model_type)) as atlas:
        blocks, stack = atlas.blocks, atlas.stacks["decoder"]
        supernodes = [np.flatnonzero(stack["label"][block.row] == schema.LABEL_SUPERNODE) for block in blocks]
    for block, core in zip(blocks, supernodes, strict=True):
        channels = next(ids for name, ids in kept.items() if name == block.module)
        assert set(core) <= set(channels.tolist())
        mask = torch.zeros(block.n_channels)
        mask[channels.tolist()] = 1
        write = next(item.parameter for item in block.tensors if item.role == "write").removesuffix(".weight")
        # The channels are masked at the input of the write projection, so this check is independent of surgery's own check.
        dense.get_submodule(write).register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
    ids = random_tokens(2, 40)
    with torch.no_grad():
        expected, found = dense(ids).logits, small(ids).logits
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


def test_a_fresh_process_loads_and_generates(pruned):
    directories = [str(pruned(model_type)) for model_type in CONFIGS]
    done = subprocess.run([sys.executable, "-c", FRESH, *directories], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(CONFIGS)
    for result in results:
        assert not result["missing"]
        assert not result["unexpected"]
        assert result["generated"] == 5
        assert result["class"] == "transformers"
        assert result["tied"] == result["expected"]
    assert any(result["expected"] for result in results)
    assert not all(result["expected"] for result in results)


def test_an_atlas_of_another_model_is_refused(tiny_atlas, tiny_checkpoint, tmp_path, capsys):
    code = surgery(
        [
            "prune",
            str(tiny_atlas("llama")),
            "--model",
            str(tiny_checkpoint("phi3")),
            "--sparsity",
            "0.5",
            "-o",
            str(tmp_path / "out"),
        ]
    )
    assert code == 2
    assert "not the model of the atlas" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_evaluation_follows_the_protocol(tiny_checkpoint, pruned, capsys):
    arguments = [
        "eval",
        str(tiny_checkpoint("llama")),
        str(pruned("llama")),
        "--data",
        "pydoc",
        "--seq-len",
        "96",
        "--max-tokens",
        "1000",
        "--json",
    ]
    capsys.readouterr()
    assert surgery(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    # 10 whole blocks and one of 40 tokens, each with a first token that is context only.
    assert [(model["blocks"], model["predicted"]) for model in result["models"]] == [(11, 989)] * 2
    assert result["models"][0]["cut"] is None
    assert result["models"][1]["cut"]["supernodes_removed"] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama")).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))
    from chanfmt.data.text import read_text

    ids = torch.tensor(tokenizer(read_text("pydoc", "evaluate").text)["input_ids"][:1000])
    total = 0.0
    for block in ids.split(96):
        with torch.no_grad():
            logits = model(block[None]).logits[0].double()
        total += float(torch.nn.functional.cross_entropy(logits[:-1], block[1:], reduction="sum"))
    assert result["models"][0]["perplexity"] == pytest.approx(np.exp(total / 989), rel=1e-5)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--seq-len", "4096"], "longer than the context of"),
        (["--max-tokens", "1", "--seq-len", "64"], "fewer than two tokens"),
        (["--data", "nowhere.txt"], "does not exist"),
    ],
)
def test_evaluation_refuses(tiny_checkpoint, capsys, extra, message):
    capsys.readouterr()
    assert surgery(["eval", str(tiny_checkpoint("llama")), "--data", "pydoc", *extra]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["prune", "--help"],
        ["eval", "--help"],
        ["plan", "ATLAS", "--sparsity", "0.5"],
    ],
)
def test_quick_commands_do_not_import_torch(tiny_atlas, arguments):
    arguments = [str(tiny_atlas("llama")) if item == "ATLAS" else item for item in arguments]
    assert not heavy_imports("surgery.cli.main", arguments)


def test_a_perplexity_is_never_nan(tmp_path, capsys):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    capsys.readouterr()
    assert surgery(["eval", str(tmp_path / "m"), "--data", "pydoc", "--seq-len", "64", "--max-tokens", "200"]) == 2
    captured = capsys.readouterr()
    assert "model.norm.weight holds NaN" in captured.err
    assert captured.out == ""


def test_a_link_to_an_earlier_result_is_replaced_behind_the_link(tiny_atlas, tiny_checkpoint, tmp_path):
    arguments = ["prune", str(tiny_atlas("gpt2")), "--model", str(tiny_checkpoint("gpt2")), "--quiet"]
    assert surgery([*arguments, "--sparsity", "0.5", "-o", str(tmp_path / "real")]) == 0
    (tmp_path / "link").symlink_to("real")
    assert surgery([*arguments, "--sparsity", "0.25", "-o", str(tmp_path / "link"), "--overwrite"]) == 0
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "real" / "surgery.json").read_text())["sparsity"]["asked"] == 0.25
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link", "real"]
