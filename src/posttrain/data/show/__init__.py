"""Rows as they will be trained: on the terminal, as one page, or as JSON."""
