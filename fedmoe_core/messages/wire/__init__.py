"""Messages between a server and real devices, as bytes."""
