"""Starting a job on many hosts: GKE (jobset), TPU VMs (tpu_vm), SLURM clusters (slurm), one machine (local).

Imports no accelerator runtime: a machine that only launches needs ml_collections alone, which brings absl and PyYAML.
"""
