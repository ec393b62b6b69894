"""What every room uses: processes, random streams, settings, progress."""
