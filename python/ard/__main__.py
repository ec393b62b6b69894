"""`python -m ard` is the `ard` command."""


def main() -> None:
    """Entry point of the console script."""
    try:
        from ard.cli import app
        from ard.common.allocator import keep_freed_memory
    except ImportError as error:
        raise SystemExit(
            f"ard: {error}; the command line needs its extras: pip install 'ard-kernels[train]'"
        ) from error
    keep_freed_memory()
    app()


if __name__ == "__main__":
    main()
