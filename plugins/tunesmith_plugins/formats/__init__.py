"""Data formats that come with tunesmith, one file each: a row of a known layout to an example."""
