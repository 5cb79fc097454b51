"""A run over real devices: what a device does with a message, and a federation whose clients answer from afar."""
