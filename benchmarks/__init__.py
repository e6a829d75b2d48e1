"""Measurements; each prints one table, and docs/results.md keeps what was measured where."""
