"""Empty so far: launchers for several GPUs, Slurm, Cloud TPU and W&B sweeps are to stand here."""
