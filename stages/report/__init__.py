"""report: writes every number of a run into one file, and the page that shows them."""
