"""Benchmarks: one harness, the fused ops one by one, whole models, and what is made of results.

``python -m benchmarks`` in a checkout lists what can be run; installed, this package is
``convmixer_fast.benchmarks`` and ``convmixer-fast bench`` uses it. ``README.md`` has the method.
"""
