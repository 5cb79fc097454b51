"""From raw text to encoded splits and seeded batches, one private part per client."""
