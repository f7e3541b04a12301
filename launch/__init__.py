"""Starting a job on many hosts: GKE (jobset), TPU VMs (tpu_vm), SLURM clusters (slurm), one machine (local).

`python -m launch.NAME` in a checkout, `python -m mlpmem_jax.launch.NAME` with an installed wheel. Imports no
accelerator runtime: a machine that only launches needs ml_collections alone, which brings absl and PyYAML.
"""
