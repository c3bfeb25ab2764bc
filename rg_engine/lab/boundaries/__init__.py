"""How well boundaries edit the demo world."""
