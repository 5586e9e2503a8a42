"""Whether a run fits where it is to run, and what it needs there: without running it and without weights."""
