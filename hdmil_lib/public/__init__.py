"""Public cohorts: what there is, which slides of it, and their download."""
