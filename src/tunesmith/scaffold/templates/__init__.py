"""What `tunesmith plugins new` writes: a sound plugin of each kind, and a test that runs the kit.

They are templates and no part of the program: `newname` and `NewName` stand for the names given.
"""
