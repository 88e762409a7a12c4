"""Rows to examples to token ids: reading, cleaning, rendering and packing of data."""
