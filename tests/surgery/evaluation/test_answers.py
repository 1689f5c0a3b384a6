"""``surgery eval --prompt``: greedy answers side by side, against a loop of plain forward passes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import surgery
from chanfmt.base.errors import ChanfmtError
from surgery.cli.main import main
from tests.support.tiny import save_tiny, tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 5
MEASURED = ["--seq-len", "64", "--max-tokens", "64", "--data", "pydoc", "--quiet"]


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A llama without a chat template, and one with."""
    chat = save_tiny(tmp_path_factory.mktemp("chat") / "chat", "llama", seed=1)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(chat)
    return tiny_checkpoint("llama"), chat


def greedy(directory: Path, text: str, most: int) -> tuple[str, int]:
    """The answer by forward passes over the whole text, without a cache, and its number of tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(ids)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip(), len(ids) - start


def test_answers_are_greedy_and_in_the_chat_template(models: tuple[Path, Path], capsys: Any) -> None:
    plain, chat = models
    prompts = ["Hello fox", "Name three."]
    arguments = [argument for prompt in prompts for argument in ("--prompt", prompt)]
    assert main(["eval", str(plain), str(chat), *MEASURED, *arguments, "--answer-tokens", "12", "--json"]) == 0
    found = [model["answers"] for model in json.loads(capsys.readouterr().out)["models"]]
    for directory, answers, shown in ((plain, found[0], "{}"), (chat, found[1], "[{}]>")):
        assert [answer["prompt"] for answer in answers] == prompts
        for answer in answers:
            assert (answer["answer"], answer["tokens"]) == greedy(directory, shown.format(answer["prompt"]), 12)
            assert answer["chat_template"] == (directory == chat)
            assert answer["ended"] == (answer["tokens"] < 12)


def test_answers_stand_side_by_side(models: tuple[Path, Path], capsys: Any) -> None:
    assert main(["eval", *map(str, models), *MEASURED, "--prompt", "Hello\nfox", "--answer-tokens", "8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("prompt"))
    assert lines[start].split() == ["prompt", "Hello", "fox"]
    assert [line.split()[0] for line in lines[start + 1 :]] == [path.name for path in models]


def test_a_settings_file_that_samples_has_no_effect(models: tuple[Path, Path], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "samples", "llama")
    transformers.GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=3.0).save_pretrained(model)
    found = surgery.evaluate([models[0], model], TEXT, seq_len=64, prompt="Hello fox", answer_tokens=12)
    assert found[0].answers == found[1].answers
    assert surgery.evaluate(model, TEXT, seq_len=64)[0].answers == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt", "Hello", "--answer-tokens", "0"], "--answer-tokens"),
        (["--prompt", "Hello", "--answer-tokens", "1000"], "128"),
        (["--prompt", "x" * 200], "128"),
    ],
)
def test_what_cannot_be_answered(models: tuple[Path, Path], options: list[str], message: str, capsys: Any) -> None:
    assert main(["eval", str(models[0]), *MEASURED, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_broken_chat_template_is_an_error_before_any_model_runs(models: tuple[Path, Path], tmp_path: Path) -> None:
    broken = save_tiny(tmp_path / "broken", "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only with a system prompt') }}"
    tokenizer.save_pretrained(broken)
    with pytest.raises(ChanfmtError, match="only with a system prompt"):
        surgery.evaluate([models[0], broken], TEXT, seq_len=64, prompt="Hello")
