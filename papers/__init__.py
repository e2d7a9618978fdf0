"""The papers' tables and figures, made with this project; run as `python -m papers.tables`."""
