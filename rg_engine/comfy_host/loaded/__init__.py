"""A loaded model as a frozen thing: gradients through it, what is kept for them, and reading its features."""
