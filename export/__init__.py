"""Exporters of the folded form."""
