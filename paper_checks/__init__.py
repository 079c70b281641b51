"""The paper's claims, measured again: `python -m paper_checks` runs a check of each."""
