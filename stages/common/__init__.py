"""What the stages share: files and their schemas, the checkpoint reader, and the adapter to transformers."""
