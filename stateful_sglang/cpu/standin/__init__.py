"""Stand-ins for packages that exist for GPUs only; installed by `cpu.platform`."""
