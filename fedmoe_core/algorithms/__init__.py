"""Federated algorithms, one file each: init, plan, client and apply."""
