"""The only floor that imports ComfyUI."""
