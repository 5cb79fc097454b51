"""The tests of transformers itself, run with fedmoe's experts."""
