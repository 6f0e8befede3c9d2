"""What is computed: one package a stage, plus what they share in `stages.common`. Nothing here imports Ray."""
