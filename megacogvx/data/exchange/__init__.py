"""Other people's formats: `importers.py` and `megatron.py` read them, `exporters.py` writes them.

Nothing that is read here is trusted: no pickled code runs, no archive member is written to disk, sizes are compared
with the file before anything of that size is made.
"""
