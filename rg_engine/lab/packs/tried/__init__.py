"""What is tried, a file for a kind of pack. Each combination is a function of a bench and of how a model is guided."""
