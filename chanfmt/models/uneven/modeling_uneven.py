"""A Llama model whose FFNs have widths of their own, as its config's ``block_configs`` says.

This file was written by chanfmt and belongs to the model in this directory. Licence: Apache-2.0.
"""

import copy
from typing import Any

from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaMLP

from .configuration_uneven import DeciLMConfig


class DeciLMModel(LlamaModel):
    """The layers of a Llama model, each with an FFN of its own width."""

    config_class = DeciLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for number, layer in enumerate(self.layers):
            own = copy.copy(config)
            own.intermediate_size = config.ffn_width(number)
            layer.mlp = LlamaMLP(own)
        self.post_init()


class DeciLMForCausalLM(LlamaForCausalLM):
    """`DeciLMModel` with a head that predicts tokens."""

    config_class = DeciLMConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.post_init()
