"""What is computed: one package a stage, and the rooms that stages share. Nothing here imports Ray."""
