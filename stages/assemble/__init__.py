"""assemble: index, config, tokenizer files and model card around the merged weights; then a load check."""
