"""recombine: what neurons feed (W_down) is solved anew, layer after layer, in closed form."""
