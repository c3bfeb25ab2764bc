"""What the project measures and makes of itself: the demo, evaluations, benchmarks, the demo model's training."""
