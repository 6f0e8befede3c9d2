"""Memory that matching neurons takes. No scipy: `plan` states it, and checks it before anything runs."""


def zip_bytes(num_members: int, num_neurons: int) -> int:
    """Bytes of the correlations of a cluster's neurons that are zipped, float32."""
    return 4 * (num_members * num_neurons) ** 2


def pair_bytes(num_neurons: int) -> int:
    """Bytes of the similarities of two experts' neurons: float32, and the assignment solver's copy in float64."""
    return 12 * num_neurons**2
