"""One short entry point for each experiment."""
