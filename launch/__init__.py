"""The same experiment on several GPUs, on Slurm, on Cloud TPU, as a W&B sweep."""
