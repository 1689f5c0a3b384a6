"""`evaluate` from Python: models by name, as files and in memory; text by name and as it is."""

from __future__ import annotations

import dataclasses
import inspect
import json

import pytest
import torch
import transformers

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.data.text import read_text
from chanfmt.hub.locate import locate_model
from surgery.cli.main import main as surgery
from surgery.evaluation.evaluate import evaluate
from surgery.evaluation.loaded import LoadedModel
from surgery.evaluation.options import EvaluateOptions
from tests.support.heard import heard
from tests.support.tiny import save_tiny, tiny_model, tiny_tokenizer

TEXT = "\n".join(f"line {number} of a text that is passed as it is" for number in range(12))
SHORT = {"seq_len": 64, "max_tokens": 300}


@pytest.fixture(scope="module")
def directory(tiny_checkpoint):
    return tiny_checkpoint("llama")


def loaded(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    return model, transformers.AutoTokenizer.from_pretrained(directory)


def test_all_forms_of_a_model_give_the_same_losses(directory):
    forms = [str(directory), directory, locate_model(str(directory)), loaded(directory), LoadedModel(*loaded(directory), "mine")]
    found = evaluate(forms, "pydoc", **SHORT)
    assert [item.model for item in found] == [str(directory), str(directory), directory.name, str(directory), "mine"]
    assert len({tuple(item.losses.nll) for item in found}) == 1
    assert [item.comparison and item.comparison.difference for item in found] == [None, 0, 0, 0, 0]
    # A model in memory may differ from the files it came from.
    assert [item.fingerprint is None for item in found] == [False, False, False, True, True]
    assert len({item.parameters for item in found}) == 1


def test_a_single_model_needs_no_list(directory):
    pair = loaded(directory)
    for model in (str(directory), directory, locate_model(str(directory)), pair, LoadedModel(*pair)):
        assert len(evaluate(model, TEXT, **SHORT)) == 1


def test_a_loaded_model_is_left_as_it_was(directory):
    torch.manual_seed(0)
    model = tiny_model("gpt2", resid_pdrop=0.5, dtype=torch.float64)
    model.train()
    model.transformer.h[1].eval()
    model.transformer.h[0].mlp.requires_grad_(False)
    before = {name: (value.clone(), value.device, value.dtype) for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    state = torch.get_rng_state()
    first, second = evaluate([(model, tiny_tokenizer())] * 2, TEXT, dtype="float32", **SHORT)
    # Dropout would make the two differ.
    assert first.losses.nll.tolist() == second.losses.nll.tolist()
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == frozen
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0])
        assert (value.device, value.dtype) == before[name][1:]


def test_a_loaded_model_gets_its_mode_back_when_it_fails():
    model = tiny_model("llama").train()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(ModelError, match="overflowed"):
        evaluate((model, tiny_tokenizer()), TEXT, **SHORT)
    assert all(module.training for module in model.modules())


def test_text_may_be_passed_as_it_is(directory, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    named = evaluate(directory, tmp_path / "a.txt", **SHORT)
    passed = evaluate(directory, TEXT, **SHORT)
    read = evaluate(directory, read_text(str(tmp_path / "a.txt"), "evaluate"), **SHORT)
    assert {item[0].tokens.sha256 for item in (named, passed, read)} == {named[0].tokens.sha256}
    assert [item.data for item in (named, passed, read)] == [str(tmp_path / "a.txt"), "text", "a.txt"]


def test_half_a_surrogate_pair_in_a_passed_text_is_replaced(directory):
    assert (
        evaluate(directory, TEXT + "\ud800", seq_len=64)[0].tokens.sha256
        == evaluate(directory, TEXT + "?", seq_len=64)[0].tokens.sha256
    )


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (lambda model, tokenizer: model, "LlamaForCausalLM is not a model that can be measured by itself"),
        (lambda model, tokenizer: [(model, model)], "LlamaForCausalLM and LlamaForCausalLM are not a model and its tokenizer"),
        (lambda model, tokenizer: [(tokenizer, model)], "is not a model that can be measured by itself"),
        (lambda model, tokenizer: [3], "int is not a model that can be measured by itself"),
    ],
)
def test_what_is_not_a_model_is_refused(models, message):
    with pytest.raises(UsageError, match=message):
        evaluate(models(tiny_model("llama"), tiny_tokenizer()), TEXT)


def test_errors_name_a_loaded_model(directory):
    with pytest.raises(UsageError, match="longer than the context of mine, 128"):
        evaluate(LoadedModel(*loaded(directory), "mine"), TEXT, seq_len=1000)


def test_options_are_checked_as_those_of_the_command_line(directory):
    for options, message in (
        ({"protocol": "other"}, "unknown protocol 'other'; choose from paper, common"),
        ({"seq_len": 1}, "--seq-len must be at least 2"),
        ({"task_limit": 3}, "have no effect without --tasks"),
        ({"tasks": []}, "--tasks names no task"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate(directory, TEXT, **options)


def test_python_and_the_command_line_have_the_same_options_and_defaults():
    signature = {name: item.default for name, item in inspect.signature(evaluate).parameters.items()}
    fields = {item.name: item.default for item in dataclasses.fields(EvaluateOptions)}
    assert signature.pop("models") is inspect.Parameter.empty
    assert fields.pop("models") is dataclasses.MISSING
    assert signature.pop("text") == fields.pop("data")
    assert signature == fields
    assert set(EvaluateOptions(models=()).settings()) == set(fields)


def test_json_is_that_of_the_command_line(directory, tmp_path, capsys):
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    assert (
        surgery(["eval", str(directory), str(other), "--data", "pydoc", "--seq-len", "64", "--max-tokens", "300", "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    found = json.loads(json.dumps(evaluate([str(directory), str(other)], "pydoc", **SHORT).to_json()))
    for value in (printed, found):
        for model in value["models"]:
            for name in ("seconds", "tokens_per_second", "peak_memory_bytes", "host_peak_memory_bytes"):
                assert model.pop(name) is not None
    assert found == printed


def test_results_are_short_in_a_session_and_tables_in_a_notebook(directory):
    model, tokenizer = loaded(directory)
    found = evaluate([directory, LoadedModel(model, tokenizer, "<b>mine\x1b[31m")], TEXT, **SHORT)
    assert repr(found).startswith(f"<Evaluations on 'text', perplexity: {str(directory)!r} ")
    for part in (found, found[0], found[0].losses, found[0].tokens, found[0].comparison, LoadedModel(model, tokenizer)):
        assert len(repr(part)) < 300
        assert "array" not in repr(part)
    assert "perplexity" in repr(found[1])
    for page in (found._repr_html_(), found[1]._repr_html_()):
        assert page.count("<table>") == page.count("</table>") > 0
        assert "&lt;b&gt;mine" in page
        assert "<b>" not in page
        assert "\x1b" not in page
    assert "text, protocol paper: 300 of" in found._repr_html_()


def test_other_tokenizers_are_warned_of(directory):
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = loaded(directory)
    begins = tiny_tokenizer()
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    with heard() as said:
        evaluate([(model, tokenizer), (model, begins)], TEXT, seq_len=64)
    assert said == ["the models' tokenizers differ, so their losses per token do not compare; bits per byte do"]
