"""Config of a Llama model whose FFNs have widths of their own, in the fields of DeciLM (Nemotron-NAS).

This file was written by chanfmt and belongs to the model in this directory. Licence: Apache-2.0.
"""

from typing import Any

from transformers import LlamaConfig


class Fields(dict[str, Any]):
    """A JSON object whose keys are attributes too: engines read ``config.block_configs[0].ffn.intermediate_size``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _as_fields(value: Any) -> Any:
    return Fields({name: _as_fields(item) for name, item in value.items()}) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """A Llama config with ``block_configs``, one object for each layer, whose ``ffn`` gives the width of the layer's FFN.

    ``ffn`` holds ``intermediate_size``, or ``ffn_mult``: then the width is two thirds of ``ffn_mult`` times the hidden size,
    rounded up to a multiple of 256.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        self.block_configs = [_as_fields(block) for block in block_configs or ()]
        super().__init__(**kwargs)

    def ffn_width(self, layer: int) -> int:
        """Width of the FFN of layer number ``layer``. Raises ValueError if the layer is not an ordinary one."""
        attention, ffn = self.block_configs[layer].attention, self.block_configs[layer].ffn
        for part in (attention, ffn):
            if part.get("no_op") or part.get("replace_with_linear"):
                raise ValueError(f"layer {layer} lacks attention or an FFN, and this code takes layers with both")
        if attention.n_heads_in_group * self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(f"layer {layer} has another number of key-value heads than num_key_value_heads says")
        if "ffn_mult" not in ffn:
            return int(ffn.intermediate_size)
        return -(-int(2 * ffn.ffn_mult * self.hidden_size / 3) // 256) * 256
