"""cluster: the dendrogram of each layer's experts, and its cut to every number of clusters."""
