"""Stand-in for ``sgl_kernel.speculative``."""

from stateful_sglang.cpu.standin.tree_ops import reconstruct_indices_from_tree_mask

__all__ = ["reconstruct_indices_from_tree_mask"]
