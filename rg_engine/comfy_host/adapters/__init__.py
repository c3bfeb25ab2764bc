"""Orthogonal adapters on a loaded model: applied, trained, saved, extracted."""
