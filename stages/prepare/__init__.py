"""prepare: surveys the checkpoint from its headers, and cuts the texts into token shards."""
