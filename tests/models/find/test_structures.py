"""One model type for every structure: found, measured, and equal to plain autograd on the weights.

The census (`python -m tests.support.census`) does the same for every type, in about half an hour.
"""

from __future__ import annotations

import numpy as np
import pytest
import transformers

from tests.support import zoo
from tests.support.census import SEQUENCES, build_atlas, check_identity, describe, findings
from tests.support.samples import samples
from tests.support.tiny import tiny_tokenizer

STRUCTURES = {
    "apertus": "2 decoder 44",  # an activation with parameters of its own
    "bitnet": "2 decoder 44 gated, normed",  # a norm between read and write
    "gemma3n_text": "2 decoder 44 gated, normed; 2 decoder 44 gated",  # a threshold in some layers
    "codegen": "2 decoder 128",  # parallel attention and FFN
    "gpt_oss": "2 decoder experts 4 x 44 gated",  # interleaved, with biases, transposed
    "hrm_text": "4 decoder 44 gated",  # fused on disk, apart in memory; layers used again and again
    "jetmoe": "2 decoder experts 4 x 44 gated",  # tokens sorted by expert, ragged
    "llama4_text": "1 decoder 52 gated; 1 decoder experts 4 x 44 gated; 1 decoder shared 44 gated",  # all tokens at once
    "zamba2": "1 decoder 44 gated",  # one FFN for several layers, adapters beside it
    "xlm": "2 decoder 128",  # FFNs without modules
}


GIVEN = {
    ("vit", zoo.IMAGE): "2 encoder 44",
    ("beit", zoo.IMAGE): "2 encoder 44",  # relative positions, scales per channel
    ("convnext", zoo.IMAGE): "4 encoder 128",  # channels last between convolutions
    ("hiera", zoo.IMAGE): "1 encoder 128; 1 encoder 256; 1 encoder 512; 1 encoder 1024",  # stages of their own width
    ("whisper", zoo.SPEECH): "2 encoder 52; 2 decoder 44",  # the loss reaches the encoder through the decoder
    ("wav2vec2", zoo.AUDIO): "2 encoder 44",  # raw waves
}


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_every_structure(tmp_path, model_type):
    transformers.logging.set_verbosity_error()
    zoo.tiny(model_type).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    plan = build_atlas(tmp_path / "model", tmp_path / "a.h5")
    assert describe(plan.ffns) == STRUCTURES[model_type]
    assert findings(tmp_path / "a.h5") == ""
    assert check_identity(plan) == "yes"


@pytest.mark.parametrize(("model_type", "family"), GIVEN)
def test_every_structure_of_given_arrays(tmp_path, model_type, family):
    transformers.logging.set_verbosity_error()
    model = zoo.tiny(model_type, family)
    model.save_pretrained(tmp_path / "model")
    np.savez(tmp_path / "in.npz", **samples(model, SEQUENCES))
    plan = build_atlas(tmp_path / "model", tmp_path / "a.h5", str(tmp_path / "in.npz"))
    assert describe(plan.ffns) == GIVEN[model_type, family]
    assert findings(tmp_path / "a.h5") == ""
    assert check_identity(plan) == "yes"
