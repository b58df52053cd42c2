"""The command ``convmixer-fast`` and what it shows."""
