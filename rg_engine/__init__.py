"""Readout guidance: steer a frozen diffusion model by the gradient of small heads that read its features.

Floors, imports run downward only: comfy_host -> guidance, training, demo -> features, heads, losses -> types, errors.
"""
