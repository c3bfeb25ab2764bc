"""Other packs' nodes beside guidance: what was tried, and what came of it (``python -m rg_engine packs``)."""
