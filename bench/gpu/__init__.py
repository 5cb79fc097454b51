"""The session on a GPU: what runs, in which order, within which time, and what is kept of it."""
