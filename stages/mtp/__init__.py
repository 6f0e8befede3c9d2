"""mtp: plans of layers that predict further tokens, by the distances of their experts' weights."""
