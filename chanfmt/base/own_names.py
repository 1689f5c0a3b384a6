"""Names in the configs of results that bring a modelling file of ours. Without torch and transformers, for plans."""

DECI_TYPE = "nemotron-nas"
"""The model type under which engines know DeciLM."""
NARROWED_FIELD = "narrowed_ffns"
"""The field that lists the FFNs of a result in the layout ``custom``."""
