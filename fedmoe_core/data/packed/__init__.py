"""Readers of what others packed: tables, which need the extra ``data``, and mail."""
