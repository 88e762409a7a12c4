"""Built-in PEFT methods, one file each."""
