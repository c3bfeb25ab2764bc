"""What finished latents are measured by: their pictures, CLIP, classifiers, readout heads; each differentiable."""
