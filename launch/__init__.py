"""Starts a job on many hosts: GKE (jobset), TPU VMs (tpu_vm), SLURM clusters (slurm), one machine (local).

Run `python -m launch.NAME` in a checkout, or `python -m mlpmem_jax.launch.NAME` with an installed wheel. Imports no
accelerator runtime: a machine that only launches needs only ml_collections, which includes absl and PyYAML.
"""
