"""What `surgery prune` will refuse is said before the measurement, with the reason that prune gives itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import transformers

from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tests.support.tiny import CONFIGS, VOCAB, save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

SMALL = ["--calib", "pydoc", "--sequences", "4", "--seq-len", "32"]
REASON = "code in the model's repository defines the model type 'foollama'"


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """A model of a type that only its own code knows."""
    directory = save_tiny(tmp_path / "remote", "llama")
    config = json.loads((directory / "config.json").read_text())
    config |= {
        "model_type": "foollama",
        "architectures": ["FooForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_foo.FooConfig", "AutoModelForCausalLM": "modeling_foo.FooForCausalLM"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "configuration_foo.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass FooConfig(LlamaConfig):\n    model_type = 'foollama'\n"
    )
    (directory / "modeling_foo.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_foo import FooConfig\n\n\n"
        "class FooForCausalLM(LlamaForCausalLM):\n    config_class = FooConfig\n"
    )
    return directory


def test_a_type_of_the_repository_is_refused_before_and_after(
    remote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = str(tmp_path / "a.h5")
    build = ["build", str(remote), "-o", output, *SMALL]
    assert atlas(build) == 2
    error = capsys.readouterr().err
    assert "needs code from its repository" in error
    assert "atlas build runs it with --trust-remote-code" in error
    build.append("--trust-remote-code")
    assert atlas([*build, "--dry-run", "--json"]) == 0
    assert REASON in json.loads(capsys.readouterr().out)["prune"]
    assert atlas([*build, "--dry-run"]) == 0
    assert REASON in capsys.readouterr().out
    assert atlas(build) == 0
    error = capsys.readouterr().err
    assert f"surgery prune will refuse it: {REASON}" in error
    assert error.index(REASON) < error.index("wrote")
    assert surgery(["prune", output, "--model", str(remote), "--sparsity", "0.5", "-o", str(tmp_path / "cut")]) == 2
    error = capsys.readouterr().err
    assert REASON in error
    assert "pip install" not in error
    assert not (tmp_path / "cut").exists()


def test_a_model_that_can_be_cut_has_no_refusal(tiny_checkpoint, tmp_path, capsys):  # type: ignore[no-untyped-def]
    assert atlas(["build", str(tiny_checkpoint("llama")), "-o", str(tmp_path / "a.h5"), *SMALL, "--dry-run", "--json"]) == 0
    assert "refused" not in json.loads(capsys.readouterr().out)["prune"]


def _reward() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, num_labels=1, **CONFIGS["llama"])
    return transformers.LlamaForSequenceClassification(config)


def _t5() -> transformers.PreTrainedModel:
    sizes = {"d_model": 36, "d_ff": 87, "num_layers": 2, "num_heads": 4, "d_kv": 9}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=VOCAB, pad_token_id=0, decoder_start_token_id=0, **sizes)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (_reward, "was saved as LlamaForSequenceClassification: it gives scores, and predicts no tokens"),
        (_t5, "is an encoder-decoder"),
    ],
)
def test_a_model_without_perplexity_is_called_what_it_is(make, words, tmp_path, capsys):  # type: ignore[no-untyped-def]
    make().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("Some text to measure.\n" * 40)
    assert surgery(["eval", str(tmp_path / "m"), "--data", str(tmp_path / "text.txt"), "--seq-len", "32"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "is an encoder as configured" not in error


def test_a_reward_model_is_not_built_as_an_encoder(tmp_path, capsys):  # type: ignore[no-untyped-def]
    _reward().save_pretrained(tmp_path / "m")
    tiny_tokenizer().save_pretrained(tmp_path / "m")
    assert atlas(["build", str(tmp_path / "m"), "-o", str(tmp_path / "a.h5"), *SMALL]) == 2
    error = capsys.readouterr().err
    assert "was saved as LlamaForSequenceClassification" in error
    assert "--loss embedding" in error
