"""lm-evaluation-harness (the extra `eval`): its tasks, and model classes for it. Only units that run tasks import it."""
