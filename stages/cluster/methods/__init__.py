"""Methods, one file each. A file holds a METHOD, and imports what computes it only when it is called."""
