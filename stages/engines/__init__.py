"""Code of this project that other engines load into their own processes."""
