"""Optimisers, and what else acts on a network while it trains."""
