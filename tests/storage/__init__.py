"""Runs whose model and run directory are URLs of object storage, on a real S3 server (moto's) on this machine."""
