"""What a whole training step, a load and a generated token cost, beside TRL, PEFT and bitsandbytes.

    python -m benchmarks.train --help

`cases` says who meets whom and what is promised, `turns` lets them take turns, each in a process
of its own (`worker`), `jobs` is what such a process does, `contestants` how a user would call each
library, `report` what becomes of it.
"""
