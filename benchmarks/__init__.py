"""Benchmarks, run from a checkout: ``python -m benchmarks.bench_model``."""
