"""Where units run: in this process, or on a Ray cluster. Both are driven by the same scheduler."""
