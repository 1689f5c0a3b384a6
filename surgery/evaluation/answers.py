"""What a model answers to a prompt: greedy decoding, with the model's chat template if it has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError, first_line
from chanfmt.base.narrate import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.models.source import ModelSource
    from surgery.evaluation.loaded import LoadedModel


@dataclass(frozen=True)
class Prompt:
    """A prompt as one model reads it.

    Attributes:
        text: The prompt.
        ids: Its tokens, with those of the chat template or of the tokenizer around it.
        chat: Whether a chat template is around it.
    """

    text: str
    ids: tuple[int, ...]
    chat: bool


@dataclass(frozen=True)
class Answer:
    """A model's greedy answer.

    Attributes:
        prompt: The prompt.
        answer: The answer, without special tokens and without space around it.
        tokens: Number of tokens that were generated.
        ended: Whether the model ended the answer itself.
        chat_template: Whether the prompt was put into the model's chat template; without one the text is continued.
    """

    prompt: str
    answer: str
    tokens: int
    ended: bool
    chat_template: bool


def read_prompts(name: str, model: ModelSource | LoadedModel, texts: Sequence[str], most: int) -> tuple[Prompt, ...]:
    """Tokenize prompts for a model. No weight is read.

    Args:
        name: What errors call the model.
        texts: The prompts.
        most: Tokens that will be generated at most. They must fit in the model's context.

    Raises:
        UsageError: A prompt has no token, or is too long for the model.
        ModelError: The model has no tokenizer, its chat template fails, or its embedding lacks a token.
    """
    from chanfmt.data.tokens import check_context, check_vocabulary

    found = []
    for text in texts:
        tokenizer = model.tokenizer
        chat = bool(getattr(tokenizer, "chat_template", None))
        try:
            given = _in_template(tokenizer, text) if chat else text
            ids = tuple(tokenizer(given, add_special_tokens=not chat)["input_ids"])
        # A chat template is a program of the model's authors, and can fail in any way.
        except Exception as error:
            what = "chat template" if chat else "tokenizer"
            raise ModelError(f"the {what} of {name} cannot take the prompt {text!r:.40}: {first_line(error)}") from None
        if not ids:
            raise UsageError(f"--prompt {text!r:.40} has no token for {name}", hint="write a prompt with words")
        check_context(model.config, len(ids) + most, name)
        check_vocabulary(model.config, tokenizer, np.array(ids, dtype=np.int64), name)
        found.append(Prompt(text, ids, chat))
    return tuple(found)


def answers(model: Any, tokenizer: Any, prompts: Sequence[Prompt], most: int, *, name: str) -> tuple[Answer, ...]:
    """Let a loaded model answer prompts, one at a time, by the most likely token each.

    Args:
        model: A causal language model in evaluation mode.
        most: Tokens of an answer at most.
        name: What errors and the progress bar call the model.

    Raises:
        ModelError: The model cannot generate.
        ChanfmtError: Memory ran out.
    """
    import torch

    from chanfmt.models.out_of_memory import out_of_memory_recognised
    from chanfmt.models.quiet import quiet_transformers

    device = next(model.parameters()).device
    ends = _ends(model, tokenizer)
    found = []
    settings = model.generation_config if hasattr(model, "generation_config") else None
    for prompt in counted(prompts, "prompt", f"{name}: answers"):
        ids = torch.tensor([prompt.ids], device=device)
        try:
            # transformers fills settings that a call leaves at their defaults from those of the model.
            model.generation_config = _greedy(most, ends)
            with out_of_memory_recognised(), torch.no_grad(), quiet_transformers():
                whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        except torch.OutOfMemoryError:
            raise ChanfmtError("out of memory while answering a prompt", hint="use --dtype bfloat16") from None
        # Code of many architectures runs here, and their errors have nothing in common.
        except Exception as error:
            raise ModelError(
                f"{name} cannot answer a prompt: {first_line(error)}", hint="leave out --prompt for this model"
            ) from error
        finally:
            model.generation_config = settings
        new = whole[len(prompt.ids) :].tolist()
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        found.append(Answer(prompt.text, text, len(new), bool(new) and new[-1] in ends, prompt.chat))
    return tuple(found)


def _in_template(tokenizer: Any, text: str) -> str:
    return str(tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True))


def _greedy(most: int, ends: Sequence[int]) -> Any:
    """Settings of transformers for greedy decoding. Those of the model may sample, or punish repetition."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else 0,
    )


def _ends(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's and the model's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = own if isinstance(own, list | tuple) else [own]
    return tuple(dict.fromkeys(token for token in (tokenizer.eos_token_id, *listed) if isinstance(token, int)))
