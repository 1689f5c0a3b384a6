"""``atlas report``: what an atlas shows, as statistics, figures and pages, beside what the paper found."""
