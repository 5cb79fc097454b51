"""The fedmoe command: words in, one verb called, words out."""
