"""Settings of the whole suite: the same examples on every machine, and no test that depends on the clock."""

from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, max_examples=60, database=None)
settings.load_profile("project")
