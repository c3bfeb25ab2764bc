"""Heads trained in a graph and from files."""
