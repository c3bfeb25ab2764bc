"""Tables of ``python -m rg_engine evaluate``, a file a capability."""
