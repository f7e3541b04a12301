"""Floor 0: errors, config checks, artifacts, mesh and sharding rules, progress and metrics."""
