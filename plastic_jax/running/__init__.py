"""A run from command line to report, and its folder."""
