"""A tunesmith plugin package to copy: the Dolly data format and the LoRA-FA method."""
