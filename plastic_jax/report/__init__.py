"""What a person sees of a result: figures, tables, the page, W&B."""
