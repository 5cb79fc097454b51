"""Local training of plain torch models: one client by itself, or many at once over stacked weights."""
