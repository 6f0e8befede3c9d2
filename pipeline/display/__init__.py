"""Terminal output: progress, tables, sizes."""
