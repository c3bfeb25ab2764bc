"""The engine inside ComfyUI. Only this folder and the lab import ComfyUI."""
