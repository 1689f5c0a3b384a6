"""``atlas report``: statistics, figures and pages of an atlas, beside the numbers of the paper."""
