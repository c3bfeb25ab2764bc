"""What a head learns from: examples, their noise, and the files that they come from."""
