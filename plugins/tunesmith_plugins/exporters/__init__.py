"""Built-in exporters, one file each."""
