"""One plugin of each kind that does not fit what stands: a file each, and a line in plugin.py."""
