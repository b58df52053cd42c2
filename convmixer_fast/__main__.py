"""``python -m convmixer_fast`` is the command ``convmixer-fast``."""

from convmixer_fast.commands.cli import main

if __name__ == "__main__":
    main()
