"""Where a node runs: one module per target behind the interface in `appliance.targets.base`."""
