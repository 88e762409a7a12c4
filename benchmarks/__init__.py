"""`make bench`: tunesmith's 4-bit arithmetic beside others', and beside what the machine can do.

`cases` says what is measured and `inputs` makes the tensors; `contestants` holds everyone who runs;
`measure` takes the time, `limits` computes what no one can beat, `bars` holds what we promise;
`report` prints, `results` writes JSON. `python -m benchmarks --help` lists the options.
"""
