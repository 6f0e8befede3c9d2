"""Makes the executor that somebody asks for. Ray is imported only where it is asked for."""

from collections.abc import Callable

from pipeline.executors.base import Executor
from stages.contracts.settings import Resources


def make_executor(address: str | None, resources: Resources, say: Callable[[str], None]) -> Executor:
    """The executor of a run.

    address: None for this process, else a Ray cluster, as `pipeline.executors.ray.connect` has it. say: is given one line about
    the connection. Raises InputError when no cluster answers at the address.
    """
    if address is None:
        from pipeline.executors.local import LocalExecutor

        return LocalExecutor()
    import ray

    from pipeline.executors.ray import RayExecutor, connect

    is_connected = ray.is_initialized()
    say(connect(address))
    return RayExecutor(resources, keeps_connection=is_connected)
