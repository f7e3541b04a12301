"""What every other package uses: errors, config checks, artifacts, mesh and sharding rules, progress and metrics."""
