"""Sizes as people read them."""


def human_bytes(num_bytes: float) -> str:
    """Bytes in decimal units with three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
