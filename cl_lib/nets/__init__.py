"""One network as a function of its parameters."""
