"""One file or folder a system: init, plan, client, apply, and what only it needs."""
