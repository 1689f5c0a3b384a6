"""A cut of a checkpoint as a GGUF file: read back by the package gguf and by transformers, which share no code with the writer."""

from __future__ import annotations

import itertools
import json
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.models.gguf import dequantized_directory, load_gguf
from chanfmt.models.source import ModelSource
from surgery.cut.apply import apply_plan
from surgery.cut.gguf.hyperparameters import hyperparameters
from surgery.cut.gguf.vocabulary import SPLITS, vocabulary
from surgery.cut.options import CutOptions
from surgery.recovery.options import BiasRecovery
from surgery.result.result import open_result
from tests.support.plans import planned
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

HEADS, KEY_HEADS, KEPT = 4, 2, 160
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "vocab_size": 264,
    "max_position_embeddings": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
CONFIGS = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma3_text": (transformers.Gemma3TextConfig, {"tie_word_embeddings": True}),
}
SCALED: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e6,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
}
SPACE = "\u2581"


def tokenizer(split: str = "gpt-2") -> Any:
    """A tokenizer of bytes and one merge that splits text as ``split`` says."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {letter: number for number, letter in enumerate(letters)} | {letters[0] + letters[1]: 256}
    known = SPLITS[split]
    model = models.BPE(vocab=words, merges=[(letters[0], letters[1])], ignore_merges=known.ignore_merges)
    found = Tokenizer(model)
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=known.pattern is None)
    first = [pre_tokenizers.Digits(individual_digits=True)] if known.digits else []
    first += [pre_tokenizers.Split(Regex(known.pattern), "isolated")] if known.pattern else []
    found.pre_tokenizer = pre_tokenizers.Sequence([*first, last]) if first else last
    found.decoder = decoders.ByteLevel()
    if known.normal_form:
        found.normalizer = normalizers.NFC()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>", chat_template="{{ messages[0]['content'] }}"
    )


def pieces() -> Any:
    """A tokenizer as SentencePiece makes them: letters, bytes for all others, and merges by score."""
    letters = [SPACE, *"abcdefgh"]
    merges = [("a", "b"), ("b", "c"), (SPACE, "a"), (SPACE, "ab"), ("ab", "c")]
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(240)), *letters, *("".join(pair) for pair in merges)]
    ids = {word: number for number, word in enumerate(words)}
    found = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Replace(" ", SPACE)
    found.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def checkpoint(directory: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> ModelSource:
    """A tiny model with a tokenizer of bytes, saved in ``directory``."""
    make, own = CONFIGS[kind]
    config = make(**SIZES | own | changes)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms and biases differ from row to row, so that a mistaken order shows.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    model.save_pretrained(directory)
    (pieces() if kind == "gemma3_text" else tokenizer()).save_pretrained(directory)
    return ModelSource(directory)


def half(source: ModelSource) -> Any:
    return planned(source.directory, lambda number, ffn: KEPT)


def logits(directory: Path, **extra: Any) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **extra).eval()
    with torch.inference_mode():
        return model(torch.arange(40)[None] * 5 % 256).logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text", *repeated("mistral", "qwen3")])
def test_the_file_computes_what_the_checkpoint_computes(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "model", kind)
    apply_plan(half(source), source, tmp_path / "plain")
    report = apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf"))
    exact, found = logits(tmp_path / "plain"), logits(tmp_path / "out", gguf_file="out.gguf")
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-6
    assert report.gguf is not None
    assert (report.gguf.converted, report.gguf.weight_error) == (True, 0)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / "out.gguf").fields.items()}
    own = fields["general.architecture"]
    assert own == {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind, kind)
    assert (fields[f"{own}.feed_forward_length"], fields["general.name"]) == (KEPT, "out")
    if own == "gemma3":
        return
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.token_type"][256:] == [1, 3, 3, 5, 5, 5, 5, 5]
    assert fields["tokenizer.chat_template"] == "{{ messages[0]['content'] }}"
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="out.gguf")
    assert read("ab 12 é").input_ids == tokenizer()("ab 12 é").input_ids


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_scaled_positions_are_written_and_read_back(tmp_path: Path, kind: str) -> None:
    source = checkpoint(tmp_path / "model", rope_parameters=SCALED[kind], head_dim=32)
    report = apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf"))
    assert report.gguf is not None
    assert any("how positions are scaled" in note for note in report.gguf.notes)
    reader = gguf.GGUFReader(tmp_path / "out" / "out.gguf")
    if kind == "llama3":
        # A divisor is the frequency without the scaling over the frequency with it, as transformers computes both.
        computed, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](source.config, "cpu")
        plain = 1e6 ** -(torch.arange(0, 32, 2, dtype=torch.float64) / 32)
        stored = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
        np.testing.assert_allclose(stored.data, plain / computed.double(), rtol=1e-6)
        assert len(set(stored.data.tolist()) - {1.0, 8.0}) == 2
    else:
        assert [reader.fields[f"llama.rope.scaling.{name}"].contents() for name in ("type", "factor")] == ["linear", 2.0]
    read = ModelSource(dequantized_directory(tmp_path / "out" / "out.gguf")).config
    assert {name: read.rope_parameters[name] for name in SCALED[kind]} == SCALED[kind]
    # Other programs read the base and the scaling from the fields of transformers 4.
    fields = json.loads((dequantized_directory(tmp_path / "out" / "out.gguf") / "config.json").read_text())
    assert {"rope_theta": fields["rope_theta"], **fields["rope_scaling"]} == SCALED[kind]
    apply_plan(half(source), source, tmp_path / "plain")
    exact, alone = logits(tmp_path / "plain"), logits(tmp_path / "out", gguf_file="out.gguf")
    with torch.inference_mode():
        ours = load_gguf(tmp_path / "out" / "out.gguf").eval()(torch.arange(40)[None] * 5 % 256).logits
    scale = float(exact.abs().max())
    assert float((ours - exact).abs().max()) < 1e-6 * scale
    # transformers by itself does not read the scaling.
    assert float((alone - exact).abs().max()) > 1e-3 * scale


def test_positions_scaled_in_an_unknown_way_are_refused(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", rope_parameters=SCALED["llama3"], head_dim=32)
    apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf"))
    path = tmp_path / "out" / "out.gguf"
    stored = next(tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "rope_freqs.weight")
    stored.data[8] = 3.0
    del stored
    with pytest.raises(ModelError, match="not those of a Llama 3"):
        dequantized_directory(path)


def test_rows_of_queries_lie_as_llama_cpp_rotates_them(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf"))
    written = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "out" / "out.gguf").tensors}
    stored = load_file(source.directory / "model.safetensors")
    for part, name, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KEY_HEADS)):
        tensor = written[f"blk.1.{name}.weight"]
        # A checkpoint keeps its dtype unless another is asked for.
        assert tensor.tensor_type.name == "BF16"
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        old = stored[f"model.layers.1.self_attn.{part}.weight"].float().numpy()
        for head in range(heads):
            for pair in range(8):
                # Numbers that are rotated together are neighbours in llama.cpp, and half a head apart in transformers.
                np.testing.assert_array_equal(values[16 * head + 2 * pair], old[16 * head + pair])
                np.testing.assert_array_equal(values[16 * head + 2 * pair + 1], old[16 * head + pair + 8])
    assert written["blk.1.attn_norm.weight"].tensor_type.name == "F32"


@pytest.mark.parametrize(("quant", "error"), [("q4_0", 0.9), *repeated(("q8_0", 0.05), ("f16", 5e-3))])
def test_a_quantised_file_is_as_close_as_its_type(tmp_path: Path, quant: str, error: float) -> None:
    source = checkpoint(tmp_path / "model")
    apply_plan(half(source), source, tmp_path / "plain")
    report = apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf", quant=quant))
    exact, found = logits(tmp_path / "plain"), logits(tmp_path / "out", gguf_file="out.gguf")
    assert float((found - exact).abs().max() / exact.abs().max()) < error
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in gguf.GGUFReader(tmp_path / "out" / "out.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == quant
    assert kinds["output.weight"] == ("q8_0" if quant == "q4_0" else quant)
    opened = open_result(tmp_path / "out").report
    assert opened.gguf == report.gguf
    assert opened.dtype is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "made from a checkpoint" in card
    assert "source file" not in card


@pytest.mark.parametrize("split", sorted(SPLITS))
def test_a_way_to_split_text_is_recognised_by_the_tokenizer_itself(tmp_path: Path, split: str) -> None:
    checkpoint(tmp_path)
    tokenizer(split).save_pretrained(tmp_path)
    assert vocabulary(ModelSource(tmp_path), 264)["tokenizer.ggml.pre"].content == split
    path = tmp_path / "tokenizer.json"
    stored = json.loads(path.read_text())
    stored["model"]["ignore_merges"] = not stored["model"]["ignore_merges"]
    path.write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r"not known to be one of llama\.cpp's"):
        vocabulary(ModelSource(tmp_path), 264)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"attention_bias": True}, "have biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, r"are scaled \(dynamic\)"),
        ("qwen2", {"rope_parameters": SCALED["llama3"]}, r"are scaled \(llama3\)"),
        ("mistral", {"sliding_window": 16}, "a window of 16 tokens"),
        ("qwen3", {"head_dim": 32}, "128 for granted"),
        ("llama", {"vocab_size": 258, "eos_token_id": 2}, "embeddings for 258 tokens"),
    ],
)
def test_what_the_file_cannot_say_is_refused_before_the_cut(
    tmp_path: Path, kind: str, changes: dict[str, Any], reason: str
) -> None:
    source = checkpoint(tmp_path / "model", kind, **changes)
    with pytest.raises(ModelError, match=reason) as refused:
        apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf"))
    assert "convert_hf_to_gguf.py" in str(refused.value.hint)
    assert not (tmp_path / "out").exists()


def test_the_order_of_merges_gives_the_scores_of_pieces(tmp_path: Path) -> None:
    source = checkpoint(tmp_path, "gemma3_text")
    values = {name.removeprefix("tokenizer.ggml."): value.content for name, value in vocabulary(source, 264).items()}
    assert (values["model"], values["add_space_prefix"]) == ("llama", False)
    tokens, scores, types = values["tokens"], values["scores"], values["token_type"]
    assert [types[number] for number in (0, 1, 240, 241, 254, 263)] == [3, 6, 6, 1, 1, 5]

    def merged(text: str) -> list[int]:
        """The tokens of ``text`` by llama.cpp's rule: the pair whose joined piece has the highest score is merged first."""
        parts = list(text.replace(" ", SPACE))
        while pairs := [
            (scores[tokens.index(one + two)], -place)
            for place, (one, two) in enumerate(itertools.pairwise(parts))
            if one + two in tokens
        ]:
            place = -max(pairs)[1]
            parts[place : place + 2] = ["".join(parts[place : place + 2])]
        return [tokens.index(part) for part in parts]

    for text in ("abc", " abc ab", "bcab a"):
        assert merged(text) == pieces()(text).input_ids


def test_a_bias_without_a_place_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model")
    # The means are missing, so that computing with them would fail.
    with pytest.raises(UsageError, match="for which a GGUF file has no place"):
        apply_plan(half(source), source, tmp_path / "out", CutOptions(format="gguf"), recovery=BiasRecovery({}, 10))


def test_a_number_that_metadata_cannot_hold_is_refused() -> None:
    with pytest.raises(ModelError, match="its context_length is 1099511627776"):
        hyperparameters(transformers.LlamaConfig(**SIZES | {"max_position_embeddings": 1 << 40}))
