"""The norms: one file each, registered by name. Import this package to have them all."""

from gpt.norms import batch, cuda_layer, dummy, layer, rms  # noqa: F401  (each registers itself)
