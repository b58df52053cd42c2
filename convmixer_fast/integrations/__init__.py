"""Optimized modules where other libraries look for them."""
