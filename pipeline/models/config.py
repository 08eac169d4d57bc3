"""How models run, whichever they are."""

from cluster.config import Config, key


class ModelsConfig(Config):
    """How models that look at images run: a task is one process with one copy of each model."""

    num_cpus: float = key(1.0, "cores declared for a task; a model uses as many threads", unit="cores", gt=0)
    batch_size: int = key(32, "images that a model is given at once", unit="images", ge=1, le=4_096)
    memory_mib: int = key(2_048, "memory declared for a task", unit="MiB", affects_result=False, ge=256)

    @property
    def threads(self) -> int:
        """Threads of a model."""
        return max(1, int(self.num_cpus))
