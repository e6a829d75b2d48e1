"""Kernels, each beside its plain-JAX twin, and the mask language. Imports nothing of mtx."""
