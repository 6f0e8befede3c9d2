"""What a person sees: progress, tables, sizes."""
