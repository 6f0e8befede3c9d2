"""requests: what tasks of lm-evaluation-harness ask of a model, as tokens; the same for the source and all exports."""
