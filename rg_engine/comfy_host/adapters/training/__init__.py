"""Adapters trained in a graph and from files, on a model that stays as it is."""
