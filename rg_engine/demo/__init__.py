"""The demo world, and the files of the embedded demo model that was trained on it."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
DEMO_HEADS = WEIGHTS / "heads"
AUTOENCODER = WEIGHTS / "autoencoder.safetensors"
DENOISER = WEIGHTS / "denoiser.safetensors"
TRANSFORMER = WEIGHTS / "transformer.safetensors"
ESTIMATOR = WEIGHTS / "estimator.safetensors"
CLIP = WEIGHTS / "clip.safetensors"
CLIP_VISION = WEIGHTS / "clip_vision.json"  # its settings, as ComfyUI reads a vision model's
