"""The search for the best tiles of a GPU."""
