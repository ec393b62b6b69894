"""The whole method on digits."""
