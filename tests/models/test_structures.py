"""One type for every structure there is: found, measured, and equal to plain autograd on the weights.

The census (`python -m tests.models.census`) does the same for every type, in about half an hour.
"""

from __future__ import annotations

import pytest
import transformers

from tests import zoo
from tests.models.census import build_atlas, check_identity, describe, findings
from tests.tiny import tiny_tokenizer

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


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_every_structure(tmp_path, model_type):
    transformers.logging.set_verbosity_error()
    zoo.tiny(model_type).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    plan = build_atlas(tmp_path / "model", tmp_path / "a.h5")
    assert describe(plan.ffns) == STRUCTURES[model_type]
    assert findings(tmp_path / "a.h5") == ""
    assert check_identity(plan) == "yes"

