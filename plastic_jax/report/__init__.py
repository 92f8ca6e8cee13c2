"""Results for a reader: figures, tables, the page, W&B."""
