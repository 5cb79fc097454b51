"""What a device can bear in a round, and what a round is predicted to cost or was measured to."""
