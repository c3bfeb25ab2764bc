"""Latents optimized for the finished picture, through the whole sampling (DOODL)."""
