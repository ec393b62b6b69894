"""What tests and benchmarks share; imported from a checkout, never installed."""
