"""The paper's claims, measured again: `python -m paper_checks` runs one script for each."""
