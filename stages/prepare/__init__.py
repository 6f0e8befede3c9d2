"""prepare: check the checkpoint from its headers, plan by layer, and cut the texts into token shards."""
