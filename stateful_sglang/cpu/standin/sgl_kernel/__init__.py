"""Stand-in for ``sgl_kernel`` on a CPU without one: what SGLang's dense models call, in torch.

SGLang imports ``sgl_kernel`` unguarded whenever its device is a CPU, and the published wheel holds
CUDA code only. Names that are merely imported raise when called. Names that are absent here
(``scalar_type``, ``quantization`` and the CUDA kernels) raise ImportError, for which SGLang has
fallbacks of its own.
"""

from stateful_sglang.cpu.standin.cache_ops import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    copy_all_layer_kv_cache_cpu,
)
from stateful_sglang.cpu.standin.tree_ops import (
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
]

IS_STANDIN = True
