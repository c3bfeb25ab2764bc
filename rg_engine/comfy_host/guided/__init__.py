"""Sampling that follows targets."""
