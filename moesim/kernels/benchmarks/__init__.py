"""The benchmarks behind a profile: the only part of compute that needs torch."""
