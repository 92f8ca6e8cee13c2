"""The table of results and the statistics on it."""
