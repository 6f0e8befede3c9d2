"""What `hcsmoe.py` offers: functions that take Python values for a run file, and typed results."""
