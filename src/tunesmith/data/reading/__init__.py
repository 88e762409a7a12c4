"""How each kind of source is read; `tunesmith.data.sources` is the door."""
