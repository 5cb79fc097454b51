"""Cohorts: which clients train at once, what that needs, and how it is done."""
