// Attention over a token-indexed KV pool: extend, decode and verify in one algorithm.
//
// A block of query rows (queries x heads of one group, so K and V are read once a group) meets the
// keys in blocks of kKeys positions, aligned to position 0 (FlashAttention, Dao 2022; splitting the
// keys over threads as in Flash-Decoding). Each block gives a partial result (maximum, sum,
// output), and partials are merged in order of position. Whether one thread merges as it goes or
// many threads leave partials for a second stage, the operations and their order are the same: a
// token's output does not depend on the batch, the threads or how many tokens were verified beside
// it.
#pragma once
#include "abi.h"
#include "plan.h"
#include "rows.h"
#include "team.h"
#include "tile.h"

namespace SG_ISA {

constexpr int kKeys = kAttnKeys;
constexpr int kFetches = 10;  // doses in which the next block is fetched, for each head

SG_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

template <class T>
struct AttnScratch {
  Left<T>* q;
  LeftRow<T>*tmp, *p;  // rows of q on their way; probabilities [rows][kKeys]
  uint32_t *k, *v;
  float *s, *o, *rows_o, *rows_ml;
  // Returns the bytes needed; with a base, sets the pointers.
  int64_t lay(const SgAttention& a, char* base) {
    const int dw = words<T>(a.head_dim), dpad = round_up(a.head_dim, kPanel);
    const int rows = plan_block_rows(a.q_heads / a.kv_heads);
    char* at = base;
    auto take = [&](int64_t bytes) {
      char* r = at;
      at += (bytes + 63) / 64 * 64;
      return r;
    };
    q = (Left<T>*)take(((int64_t)rows * left_size<T>(a.head_dim) + kPackSlack) * 4);
    tmp = (LeftRow<T>*)take((int64_t)kTileRows * left_size<T>(a.head_dim) * 4);
    k = (uint32_t*)take((int64_t)kKeys * dw * 4);
    v = (uint32_t*)take(Pairs<T>::yes ? (int64_t)words<T>(kKeys) * dpad * 4 : 0);
    p = (LeftRow<T>*)take((int64_t)kTileRows * kKeys * sizeof(LeftRow<T>));
    s = (float*)take((int64_t)kTileRows * kKeys * 4);
    o = (float*)take((int64_t)kTileRows * dpad * 4);
    rows_o = (float*)take((int64_t)rows * dpad * 4);
    rows_ml = (float*)take((int64_t)rows * 2 * 4);
    return at - base;
  }
};

// V rows [from, n_pad) of a block as panels [head_dim / 32][key words][32]; those past n are zero.
SG_INLINE void pack_values(const bf16* const* rows, int from, int n, int n_pad, int dim,
                           uint32_t* out) {
  const int pairs = n_pad / 2;
#if defined(__AVX512BW__)
  // Words 0..15 and 16..31 of two interleaved rows of 32.
  const __m512i step = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i first =
      _mm512_or_si512(step, _mm512_slli_epi32(_mm512_add_epi32(step, _mm512_set1_epi32(32)), 16));
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
#endif
  for (int d0 = 0, panel = 0; d0 < dim; d0 += kPanel, panel++) {
    const int width = dim - d0 < kPanel ? dim - d0 : kPanel;
    for (int j = from / 2; j < pairs; j++) {
      uint32_t* o = out + ((int64_t)panel * words<bf16>(kKeys) + j) * kPanel;
      const bf16* lo = 2 * j < n ? rows[2 * j] + d0 : nullptr;
      const bf16* hi = 2 * j + 1 < n ? rows[2 * j + 1] + d0 : nullptr;
#if defined(__AVX512BW__)
      if (width == kPanel && hi) {
        const __m512i a = _mm512_loadu_si512(lo), b = _mm512_loadu_si512(hi);
        _mm512_storeu_si512(o, _mm512_permutex2var_epi16(a, first, b));
        _mm512_storeu_si512(o + 16, _mm512_permutex2var_epi16(a, second, b));
        continue;
      }
#endif
      for (int i = 0; i < kPanel; i += kLanes) {
        if (i + kLanes <= width) {
          vu w = lo ? widen(lo + i) : vu{};
          if (hi) w |= widen(hi + i) << 16;
          store_bits(o + i, w);
        } else {
          for (int l = i; l < i + kLanes; l++)
            o[l] = l < width ? ((lo ? lo[l] : 0u) | (hi ? (uint32_t)hi[l] << 16 : 0u)) : 0u;
        }
      }
    }
  }
}
// Where there are no pairs to interleave, values are taken from the pool as they lie: MR rows of
// probabilities times NV vectors of n values, key by key.
template <class T, int MR, int NV>
SG_INLINE void values_columns(const float* p, const T* const* rows, int n, int d0, int width,
                              float* o, int ldo) {
  vf acc[MR][NV];
#pragma GCC unroll 6
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = vf{};
  for (int j = 0; j < n; j++) {
    const T* row = rows[j] + d0;
    outer_product<MR, NV>(
        acc, [&](int r) __attribute__((always_inline)) { return p[r * kKeys + j]; },
        [&](int v) __attribute__((always_inline)) {
          return NV == 1 ? load_upto(row, width) : load(row + v * kLanes);
        });
  }
#pragma GCC unroll 6
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(o + (int64_t)r * ldo + d0 + v * kLanes, acc[r][v]);
}

template <class T, int MR>
SG_INLINE void values_mr(const float* p, const T* const* rows, int n, int dim, float* o, int ldo) {
  constexpr int kVecs = tile_vecs(MR);
  int d = 0;
  for (; d + kVecs * kLanes <= dim; d += kVecs * kLanes)
    values_columns<T, MR, kVecs>(p, rows, n, d, 0, o, ldo);
  for (; d < dim; d += kLanes) values_columns<T, MR, 1>(p, rows, n, d, dim - d, o, ldo);
}

// o[r][0..dim) = sum over n keys of p[r][key] * rows[key], r < n_rows.
template <class T>
static void tile_values(int n_rows, const float* p, const T* const* rows, int n, int dim, float* o,
                        int ldo) {
  switch (n_rows) {
#define SG_CASE(R) \
  case R:          \
    return values_mr<T, R>(p, rows, n, dim, o, ldo);
    SG_EACH_TILE(SG_CASE)
#undef SG_CASE
  }
}

// One row of a block: scores become probabilities p (zero outside [lo, hi)); gives (max, sum).
template <class T>
SG_INLINE void softmax_row(const SgAttention& a, float* s, int lo, int hi, int n, LeftRow<T>* p,
                           const uint8_t* allowed, int allowed_from, float* m_out, float* l_out) {
  constexpr bool kExact = sizeof(T) == 4;
  const float log2e = 1.44269504088896341f;
  const float none = -__builtin_inff();
  for (int i = 0; i < lo; i++) s[i] = none;
  for (int i = hi > lo ? hi : lo; i < n; i++) s[i] = none;
  if (allowed)
    for (int i = allowed_from > lo ? allowed_from : lo; i < hi; i++)
      if (!allowed[i - allowed_from]) s[i] = none;
  vf factor = splat(a.scale * log2e);
  if (a.logit_cap > 0) {
    const vf in = splat(a.scale / a.logit_cap);
    for (int i = 0; i < n; i += kLanes) {
      vf x = load(s + i);
      vf y = tanhv(x * in) * a.logit_cap;
      store(s + i, x == splat(none) ? x : y);
    }
    factor = splat(log2e);
  }
  vf top = splat(none);
  for (int i = 0; i < n; i += kLanes) top = vmax(top, load(s + i));
  const float m = max_of(top) * factor[0];
  if (m == none || m != m) {  // nothing allowed, or a NaN, which shows in the sum
    for (int i = 0; i < n; i += kLanes) store(p + i, splat(m != m ? m : 0.0f));
    *m_out = none;
    *l_out = m != m ? m : 0.0f;
    return;
  }
  vf total = vf{};
  const vf vm = splat(m);
  for (int i = 0; i < n; i += kLanes) {
    vf x = load(s + i);
    vf e = exp2_down<kExact>(x * factor - vm);
    total += e;
    store(p + i, e);
  }
  *m_out = m;
  *l_out = sum(total);
}

// Fold a later block's partial into a row's state; the first one is taken as it is.
SG_INLINE void merge_row(float* o, float* ml, const float* bo, float bm, float bl, int dpad,
                         bool first) {
  if (first) {
    memcpy(o, bo, dpad * 4);
    ml[0] = bm;
    ml[1] = bl;
    return;
  }
  if (bm == -__builtin_inff() && bl == 0.0f) return;
  const float m = ml[0] > bm ? ml[0] : bm;
  const float x = exp2s(ml[0] - m), y = exp2s(bm - m);
  for (int d = 0; d < dpad; d += kLanes) store(o + d, load(o + d) * x + load(bo + d) * y);
  ml[0] = m;
  ml[1] = ml[1] * x + bl * y;
}

template <class T>
SG_INLINE void write_row(const SgAttention& a, const float* o, float l, int64_t token, int head) {
  T* out = (T*)a.out + token * a.out_token + head * a.out_head;
  const float inv = l == 0.0f ? 0.0f : 1.0f / l;
  for (int d = 0; d < a.head_dim; d += kLanes)
    store_upto(out + d, load(o + d) * inv, a.head_dim - d);
}

// Where the keys and values of one block are.
template <class T>
struct BlockRows {
  const T *k[kKeys], *v[kKeys];
  int n = 0;

  // Of one KV head.
  SG_INLINE_MEMBER void find(const SgAttention& a, const int32_t* slots, int head, int64_t k0,
                             int64_t seq) {
    n = (int)(seq - k0 < kKeys ? seq - k0 : kKeys);
    for (int j = 0; j < n; j++) {
      const int64_t slot = slots[k0 + j];
      k[j] = (const T*)a.k_pool + slot * a.k_slot + head * a.k_head;
      v[j] = (const T*)a.v_pool + slot * a.v_slot + head * a.v_head;
    }
  }
};

// The keys and values of a block for all heads of an item, fetched bit by bit while the block
// before is computed: they lie a token apart, which the hardware does not follow for long, and more
// than some dozen lines on their way at once would hold up everything else.
template <class T>
struct BlockFetch {
  const SgAttention& a;
  const int32_t* slots;
  int64_t at, end;  // positions
  int head, bytes;  // the first head, and of all heads of one token

  SG_INLINE_MEMBER void some(int tokens) {
    for (const int64_t to = at + tokens < end ? at + tokens : end; at < to; at++) {
      const int64_t slot = slots[at];
      const char* k = (const char*)((const T*)a.k_pool + slot * a.k_slot + head * a.k_head);
      const char* v = (const char*)((const T*)a.v_pool + slot * a.v_slot + head * a.v_head);
      for (int b = 0; b < bytes; b += 64) {
        __builtin_prefetch(k + b, 0, 2);
        __builtin_prefetch(v + b, 0, 2);
      }
    }
  }
};

template <class T>
static void attend_item(const SgAttention& a, const SgAttnItem& it, float* partials,
                        AttnScratch<T>& sc) {
  const int group = a.q_heads / a.kv_heads, dim = a.head_dim;
  const int dw = words<T>(dim), dpad = round_up(dim, kPanel);
  const int64_t first = a.q_starts[it.request];
  const int n_new = (int)(a.q_starts[it.request + 1] - first);
  const int64_t seq = a.seq_lens[it.request], prefix = seq - n_new;
  const int rows = (it.q1 - it.q0) * group, q_size = left_size<T>(dim);
  const int tile = even_tile(rows), heads = it.heads();
  const int32_t* slots = a.req_to_token + a.req_index[it.request] * a.req_stride;
  const uint8_t* mask = nullptr;
  if (a.mask && a.mask_offsets[it.request] >= 0) mask = a.mask + a.mask_offsets[it.request];
  // Row r of head h is row h * rows + r of what is kept between blocks.
  for (int h = 0; h < heads; h++) {
    for (int t = 0; t < rows; t += tile) {
      const int n = rows - t < tile ? rows - t : tile;
      const LeftRow<T>* src[kTileRows];
      for (int r = 0; r < n; r++) {
        const int64_t token = first + it.q0 + (t + r) / group;
        const int head = (it.head0 + h) * group + (t + r) % group;
        src[r] = convert_row((const T*)a.q + token * a.q_token + head * a.q_head, dim,
                             sc.tmp + (int64_t)r * dim);
      }
      pack_left<T>(src, n, dim, sc.q + (int64_t)(h * rows + t) * q_size);
    }
  }

  const int64_t end = (int64_t)it.block1 * kKeys < seq ? (int64_t)it.block1 * kKeys : seq;
  const int bytes = (int)(((heads - 1) * a.k_head + dim) * sizeof(T));
  BlockFetch<T> fetch{a, slots, (int64_t)it.block0 * kKeys, end, it.head0, bytes};
  fetch.some(kKeys);
  const int dose = (kKeys + heads * kFetches - 1) / (heads * kFetches);
  BlockRows<T> now;
  for (int block = it.block0; block < it.block1; block++) {
    const int64_t k0 = (int64_t)block * kKeys;
    fetch.at = k0 + kKeys;
    for (int h = 0; h < heads; h++) {
      now.find(a, slots, it.head0 + h, k0, seq);
      const int n_keys = now.n;
      for (int j = 0; j < n_keys; j += kPanel) {
        pack_panel((const uint32_t* const*)now.k + j, n_keys - j < kPanel ? n_keys - j : kPanel, dw,
                   sc.k + (int64_t)j * dw);
        if constexpr (Pairs<T>::yes) pack_values(now.v, j, n_keys, j + kPanel, dim, sc.v);
        fetch.some(dose);
      }
      float* part =
          partials + it.partial + (int64_t)((block - it.block0) * heads + h) * rows * (dpad + 2);
      for (int t = 0; t < rows; t += tile) {
        const int n = rows - t < tile ? rows - t : tile;
        // Keys this tile can see at all: up to its last query, or all where a mask decides.
        const int64_t last = prefix + it.q0 + (t + n - 1) / group;
        int64_t see = a.causal && !mask ? last + 1 - k0 : n_keys;
        see = see < 0 ? 0 : see > n_keys ? n_keys : see;
        const int used = round_up((int)see, kPanel);
        const Left<T>* q = sc.q + (int64_t)(h * rows + t) * q_size;
        for (int j = 0; j < used; j += kPanel) {
          tile_packed<T>(n, q, sc.k + (int64_t)j * dw, dw, sc.s + j, kKeys);
          if (t == 0) fetch.some(dose);
        }
        float m[kTileRows], l[kTileRows];
        for (int r = 0; r < n; r++) {
          const int qi = it.q0 + (t + r) / group;
          const int64_t position = prefix + qi;
          int64_t hi = a.causal && !mask ? position + 1 - k0 : n_keys;
          int64_t lo = a.window < 0 ? 0 : position - a.window - k0;
          hi = hi < 0 ? 0 : hi > n_keys ? n_keys : hi;
          lo = lo < 0 ? 0 : lo > used ? used : lo;
          const uint8_t* allowed = mask ? mask + (int64_t)qi * n_new : nullptr;
          int64_t from = prefix - k0;  // where the new rows begin, in this block's keys
          if (allowed && from < 0) {
            allowed -= from;
            from = 0;
          }
          if (used > 0)
            softmax_row<T>(a, sc.s + r * kKeys, (int)lo, (int)hi, used, sc.p + r * kKeys,
                           from < n_keys ? allowed : nullptr, (int)from, &m[r], &l[r]);
          else
            m[r] = -__builtin_inff(), l[r] = 0.0f;
        }
        if (t == 0) fetch.some(2 * dose);
        if constexpr (Pairs<T>::yes) {
          for (int d = 0; d < dpad / kPanel; d++)
            tile_rows<T, kKeys / 2>(n, (const Left<T>*)sc.p,
                                    sc.v + (int64_t)d * words<T>(kKeys) * kPanel, words<T>(used),
                                    sc.o + d * kPanel, dpad);
        } else {
          tile_values<T>(n, sc.p, now.v, used < n_keys ? used : n_keys, dim, sc.o, dpad);
        }
        for (int r = 0; r < n; r++) {
          const float* bo = sc.o + r * dpad;
          if (it.partial >= 0) {
            float* dst = part + (int64_t)(t + r) * (dpad + 2);
            memcpy(dst, bo, dpad * 4);
            dst[dpad] = m[r];
            dst[dpad + 1] = l[r];
          } else {
            const int64_t row = h * rows + t + r;
            merge_row(sc.rows_o + row * dpad, sc.rows_ml + 2 * row, bo, m[r], l[r], dpad,
                      block == it.block0);
          }
        }
      }
    }
    fetch.some(kKeys);
  }
  if (it.partial < 0)
    for (int row = 0; row < heads * rows; row++)
      write_row<T>(a, sc.rows_o + (int64_t)row * dpad, sc.rows_ml[2 * row + 1],
                   first + it.q0 + row % rows / group,
                   (it.head0 + row / rows) * group + row % rows % group);
}

// Put the partials of a split item together.
template <class T>
static void merge_item(const SgAttention& a, const SgAttnItem& it, const float* partials,
                       AttnScratch<T>& sc) {
  const int group = a.q_heads / a.kv_heads, dpad = round_up(a.head_dim, kPanel);
  const int rows = (it.q1 - it.q0) * group, all = it.heads() * rows;
  for (int row = 0; row < all; row++) {
    for (int b = 0; b < it.blocks(); b++) {
      const float* p = partials + it.partial + ((int64_t)b * all + row) * (dpad + 2);
      merge_row(sc.rows_o, sc.rows_ml, p, p[dpad], p[dpad + 1], dpad, b == 0);
    }
    write_row<T>(a, sc.rows_o, sc.rows_ml[1], a.q_starts[it.request] + it.q0 + row % rows / group,
                 (it.head0 + row / rows) * group + row % rows % group);
  }
}

template <class T>
static void write_kv_stage(SgTeam& team, const SgAttention& a) {
  team.share_range(a.tokens, 8, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
      for (int h = 0; h < a.kv_heads; h++) {
        memcpy((T*)a.k_pool + a.out_loc[t] * a.k_slot + h * a.k_head,
               (const T*)a.k_new + t * a.kn_token + h * a.kn_head, a.head_dim * sizeof(T));
        memcpy((T*)a.v_pool + a.out_loc[t] * a.v_slot + h * a.v_head,
               (const T*)a.v_new + t * a.vn_token + h * a.vn_head, a.head_dim * sizeof(T));
      }
  });
}

template <class T>
static void attention_stage(SgTeam& team, const SgAttention& a, const SgAttnPlan& plan) {
  AttnScratch<T> sc;
  sc.lay(a, team.scratch);
  team.share(plan.n_items, [&](int64_t i) { attend_item<T>(a, plan.items[i], plan.partials, sc); });
  if (plan.n_merges > 0)
    team.share(plan.n_merges,
               [&](int64_t i) { merge_item<T>(a, plan.merges[i], plan.partials, sc); });
}

}  // namespace SG_ISA
