"""Shared by all other packages: errors, config checks, artifacts, mesh and sharding rules, progress."""
