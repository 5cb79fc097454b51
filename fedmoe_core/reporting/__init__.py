"""What finished runs came to, read back from their directories: figures, tables, page."""
