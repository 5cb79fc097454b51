"""Virtual time of a run: what clients take, who comes late, and when a round ends."""
