"""ControlNets for the demo model, on the same pairs as heads."""
