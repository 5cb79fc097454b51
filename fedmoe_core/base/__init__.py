"""What every room may lean on: seeded draws, numbers in words, files that are whole or not there."""
