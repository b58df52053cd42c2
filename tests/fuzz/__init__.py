"""Inputs that nobody wrote down: ``make fuzz`` makes them by the minute, ``make test`` a few."""
