"""Numbers of "Supernodes and Halos" (arXiv 2604.23475v1) that a report compares an atlas with."""

from __future__ import annotations

MODEL = "Llama-3.1-8B"
TOP_SHARE = 0.587
"""Median over layers of the share of LP in the top 1%."""
TOP_SHARE_RANGE = (0.330, 0.861)
MAX_OVER_MEAN = 2.6e3
FACTORS = {"lp": 0.402, "lp_factored": 0.383, "activation_power": 0.270, "curvature": 0.032}
"""Median share in the top 1% by each metric, by the protocol that compares 8B with 70B."""
ACTIVATION_JACCARD = 0.054
SPEARMAN = {"activation_power": 0.321, "write_norm": -0.003, "up_norm": -0.005, "gate_norm": 0.154}
"""Metric to the median over layers of Spearman's correlation with LP."""
HALO_RATIO = 2.0
"""Redundancy to the supernodes: halo over other channels. The published code adds 1e-8 to variances of about 1e-16."""
READ_HALO = 0.10
"""Share of a layer's channels that are its read halo."""
DOMAINS = "The paper compares texts of different domains: their sets by LP have a Jaccard index of about 6%."
