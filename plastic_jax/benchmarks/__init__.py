"""How fast the core is, beside what a user would run instead."""
