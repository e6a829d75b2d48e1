"""One command that checks and times as much as fits into a few minutes of an accelerator; docs/gpu_day.md."""
