"""Stand-ins for packages that exist as CUDA builds only; installed by `stateful_sglang.cpu.platform`."""
