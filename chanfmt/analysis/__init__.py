"""Statistics of an atlas: what the paper says about importance, as functions of arrays."""
