"""The documentation site: pages made from the code, and what keeps written pages true."""
