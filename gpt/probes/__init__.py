"""Probes: statistics of a training step, leaks between tokens, cards of the norms."""
