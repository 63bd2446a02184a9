"""Command lines of training software: launch scripts read into scenarios, and layouts written as flags."""
