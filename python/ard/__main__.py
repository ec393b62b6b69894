"""`python -m ard` is the `ard` command."""

from ard.cli import main

if __name__ == "__main__":
    main()
