"""Built-in trainers, one file each."""
