// Entry points: choose the instruction set, plan the work, run the team.
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

const SgKernels* g_kernels = nullptr;

const SgKernels* find(const char* name) {
#if defined(__x86_64__) && !defined(SG_PORTABLE_ONLY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bf16");
  if (avx512 && (!name || !strcmp(name, "avx512"))) return &sg_kernels_avx512;
  if (avx2 && (!name || !strcmp(name, "avx2"))) return &sg_kernels_avx2;
#endif
  if (!name || !strcmp(name, "portable")) return &sg_kernels_portable;
  return nullptr;
}

// Memory that grows and stays: a forward pass asks for the same sizes again and again.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(at_); }
  char* get(int64_t bytes) {
    if (bytes > size_) {
      free(at_);
      size_ = (bytes + bytes / 4 + 4095) / 4096 * 4096;
      at_ = static_cast<char*>(aligned_alloc(4096, size_));
      if (!at_) abort();
    }
    return at_;
  }

 private:
  char* at_ = nullptr;
  int64_t size_ = 0;
};

// One per calling thread: Python may call from several, having let go of its lock.
struct Workspace {
  Buffer scratch, shared, partials;
  std::vector<SgStage> stages;
  std::vector<SgAttnItem> items, merges;
};
thread_local Workspace g_work;

template <class F>
void run(int stages, int64_t scratch_bytes, int64_t want, F f) {
  const int most = omp_in_parallel() ? 1 : omp_get_max_threads();
  const int threads = static_cast<int>(std::clamp<int64_t>(want, 1, most));
  // A page between threads' scratch, so that no two share a line and not all share cache sets.
  const int64_t each = (scratch_bytes + 4095) / 4096 * 4096 + 4096 + 256;
  char* scratch = g_work.scratch.get(each * threads);
  g_work.stages.assign(stages, SgStage{0, 0});
  SgStage* shared = g_work.stages.data();
  if (threads == 1) {
    SgTeam team{0, 1, shared, scratch};
    f(team);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int id = omp_get_thread_num();
    SgTeam team{
        id, omp_get_num_threads(), shared,
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(scratch) + each * id + 63) / 64 * 64)};
    f(team);
  }
}

SgAttnPlan plan_attention(const SgAttention& a, int threads) {
  auto& items = g_work.items;
  auto& merges = g_work.merges;
  items.clear();
  merges.clear();
  const int group = a.q_heads / a.kv_heads;
  const int per = plan_block_queries(group);
  const auto cost = [&](const SgAttnItem& it) {
    return static_cast<int64_t>(it.heads()) * it.blocks() * ((it.q1 - it.q0) * group + 8);
  };
  const auto add = [&](bool join_heads) {
    int64_t total = 0, blocks = 0;
    items.clear();
    for (int b = 0; b < a.batch; b++) {
      const int n_new = static_cast<int>(a.q_starts[b + 1] - a.q_starts[b]);
      const int64_t seq = a.seq_lens[b], prefix = seq - n_new;
      const bool masked = !a.causal || (a.mask && a.mask_offsets[b] >= 0);
      for (int q0 = 0; q0 < n_new; q0 += per) {
        const int q1 = std::min(n_new, q0 + per);
        const int64_t last = masked ? seq : prefix + q1;
        const int64_t low = a.window < 0 ? 0 : std::max<int64_t>(0, prefix + q0 - a.window);
        const int joined = join_heads ? std::max(1, per / (q1 - q0)) : 1;
        for (int h = 0; h < a.kv_heads; h += joined) {
          const SgAttnItem it{b,
                              h,
                              std::min(h + joined, a.kv_heads),
                              q0,
                              q1,
                              static_cast<int>(low / kAttnKeys),
                              static_cast<int>((last + kAttnKeys - 1) / kAttnKeys),
                              -1};
          items.push_back(it);
          total += cost(it);
          blocks += it.blocks();
        }
      }
    }
    return std::pair<int64_t, int64_t>(total, blocks);
  };
  auto [total, most_items] = add(true);
  // Too few blocks of keys to go round: heads are all that is left to share.
  if (threads > 1 && most_items < 2 * threads) std::tie(total, most_items) = add(false);
  // Split an item over its keys when it alone would hold up the team.
  const int dpad = (a.head_dim + 31) / 32 * 32;
  int64_t floats = 0;
  const size_t whole = items.size();
  if (threads > 1) {
    const int64_t fair = total / (threads * 2) + 1;
    for (size_t i = 0; i < whole; i++) {
      const SgAttnItem it = items[i];
      const int64_t block_floats =
          static_cast<int64_t>(it.q1 - it.q0) * group * it.heads() * (dpad + 2);
      if (cost(it) <= 2 * fair || it.blocks() < 2) continue;
      const int parts =
          static_cast<int>(std::min<int64_t>(it.blocks(), (cost(it) + fair - 1) / fair));
      const int step = (it.blocks() + parts - 1) / parts;
      SgAttnItem all = it;
      all.partial = floats;
      merges.push_back(all);
      for (int k = it.block0; k < it.block1; k += step) {
        SgAttnItem part = it;
        part.block0 = k;
        part.block1 = std::min(k + step, it.block1);
        part.partial = floats + (k - it.block0) * block_floats;
        if (k == it.block0)
          items[i] = part;
        else
          items.push_back(part);
      }
      floats += it.blocks() * block_floats;
    }
  }
  std::stable_sort(items.begin(), items.end(),
                   [&](const SgAttnItem& x, const SgAttnItem& y) { return cost(x) > cost(y); });
  auto* partials = reinterpret_cast<float*>(g_work.partials.get(floats * 4 + 64));
  return {items.data(), static_cast<int64_t>(items.size()), merges.data(),
          static_cast<int>(merges.size()), partials};
}

}  // namespace

#define SG_API extern "C" __attribute__((visibility("default")))

// Sizes of the structs, for the caller to compare with its own.
SG_API int64_t sg_abi(int which) {
  const int64_t sizes[] = {sizeof(SgAttention), sizeof(SgLinear), sizeof(SgNorm),
                           sizeof(SgRope),      sizeof(SgGated),  sizeof(SgSample),
                           sizeof(SgLayer),     sizeof(SgDecoder)};
  return which >= 0 && which < 8 ? sizes[which] : -1;
}

// Use the named instruction set, or the best; the name in use, or null if it can't run here.
SG_API const char* sg_select(const char* name) {
  const SgKernels* k = find(name && *name ? name : nullptr);
  if (!k) return nullptr;
  g_kernels = k;
  return k->name;
}

SG_API void sg_attention(const SgAttention* a) {
  if (a->tokens == 0 && !a->k_new) return;
  const int threads = omp_get_max_threads();
  const SgAttnPlan plan = plan_attention(*a, threads);
  run(3, g_kernels->attention_scratch(*a), std::max<int64_t>(1, plan.n_items),
      [&](SgTeam& t) { g_kernels->attention(t, *a, plan); });
}

SG_API int64_t sg_packed_bytes(int dtype, int cols, int inner) {
  const int per = dtype == SG_F32 ? 1 : 2;
  return static_cast<int64_t>((cols + 31) / 32) * ((inner + per - 1) / per) * 32 * 4;
}

SG_API void sg_pack(int dtype, const void* weight, int64_t row_stride, int cols, int inner,
                    int interleave, void* out) {
  run(1, 0, (cols + 31) / 32, [&](SgTeam& t) {
    g_kernels->pack(t, dtype, weight, row_stride, cols, inner, interleave != 0, out);
  });
}

// Bytes of an int8 weight; its scales are (cols + 31) / 32 * 32 floats.
SG_API int64_t sg_packed_int8_bytes(int cols, int inner) {
  return static_cast<int64_t>((cols + 31) / 32) * inner * 32;
}

SG_API void sg_pack_int8(int dtype, const void* weight, int64_t row_stride, int cols, int inner,
                         int interleave, void* out, float* scale) {
  run(1, 0, (cols + 31) / 32, [&](SgTeam& t) {
    g_kernels->pack_int8(t, dtype, weight, row_stride, cols, inner, interleave != 0, out, scale);
  });
}

SG_API void sg_linear(const SgLinear* a) {
  run(1, g_kernels->linear_scratch(*a), (a->cols + 31) / 32,
      [&](SgTeam& t) { g_kernels->linear(t, *a); });
}

// Row-wise work: another thread pays from some thousands of elements on.
static int64_t threads_for(int64_t rows, int64_t cols) {
  return std::min(rows, rows * cols / 8192);
}

SG_API void sg_norm(const SgNorm* a) {
  run(1, 0, threads_for(a->rows, a->cols), [&](SgTeam& t) { g_kernels->norm(t, *a); });
}
SG_API void sg_rope(const SgRope* a) {
  run(1, 0, threads_for(a->tokens, (a->q_heads + a->k_heads) * a->head_dim),
      [&](SgTeam& t) { g_kernels->rope(t, *a); });
}
SG_API void sg_gated(const SgGated* a) {
  run(1, 0, threads_for(a->rows, 4 * a->cols), [&](SgTeam& t) { g_kernels->gated(t, *a); });
}

SG_API void sg_decoder(const SgDecoder* d) {
  if (d->tokens == 0) return;
  SgAttention a = {};
  a.batch = d->batch;
  a.q_heads = d->q_heads;
  a.kv_heads = d->kv_heads;
  a.head_dim = d->head_dim;
  a.seq_lens = d->seq_lens;
  a.q_starts = d->q_starts;
  a.causal = 1;
  a.window = -1;  // one plan for all layers; a window's masked blocks contribute nothing
  a.mask = d->mask;
  a.mask_offsets = d->mask_offsets;
  const SgAttnPlan plan = plan_attention(a, omp_get_max_threads());
  char* shared = g_work.shared.get(g_kernels->decoder_shared(*d) + 64);
  run(9 * d->layers + 2, g_kernels->decoder_scratch(*d), 1 << 20,
      [&](SgTeam& t) { g_kernels->decoder(t, *d, plan, shared); });
}
