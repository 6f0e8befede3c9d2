"""assemble: writes index, config, tokenizer files and model card beside the merged weights, then checks that they load."""
