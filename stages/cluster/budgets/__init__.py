"""Kinds of budgets, one file each. None imports scipy before it computes."""
