"""What a run is given beside its config."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Where to read, write and log, and how; none of it changes a result."""

    workdir: str | None = None
    data_dir: str | None = None
    dry_run: bool = False
    overwrite: bool = False
    wandb: str = "auto"
    device_memory_gib: float = 0.0
    command: str = ""
    progress: bool = True
