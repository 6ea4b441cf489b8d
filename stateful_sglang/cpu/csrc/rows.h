// Row-wise operations: RMSNorm, rotary embedding, gated activations.
#pragma once
#include "abi.h"
#include "team.h"
#include "simd.h"

namespace SG_ISA {

template <class T>
SG_INLINE float square_sum(const T* x, int n) {
  vf acc = vf{};
  for (int i = 0; i < n; i += kLanes) {
    vf v = load_upto(x + i, n - i);
    acc += v * v;
  }
  return sum(acc);
}

// out = x / rms(x) * (weight + offset)
template <class X, class W, class O>
SG_INLINE void norm_row(const X* x, const W* weight, float offset, float eps, int n, O* out) {
  const float inv = 1.0f / __builtin_sqrtf(square_sum(x, n) / n + eps);
  for (int i = 0; i < n; i += kLanes) {
    const int left = n - i;
    store_upto(out + i, load_upto(x + i, left) * inv * (load_upto(weight + i, left) + offset),
               left);
  }
}

// A row in another type, in `tmp` unless it is in that type already.
template <class T>
SG_INLINE const T* convert_row(const T* x, int, T*) {
  return x;
}
template <class X, class O>
SG_INLINE const O* convert_row(const X* x, int n, O* tmp) {
  for (int i = 0; i < n; i += kLanes) store_upto(tmp + i, load_upto(x + i, n - i), n - i);
  return tmp;
}

template <class T>
static void norm_stage(SgTeam& team, const SgNorm& a) {
  team.share_range(a.rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) {
      const T* x = (const T*)a.x + r * a.x_row;
      if (a.residual) {
        T* res = (T*)a.residual + r * a.residual_row;
        for (int i = 0; i < a.cols; i += kLanes) {
          const int left = a.cols - i;
          store_upto(res + i, load_upto(x + i, left) + load_upto(res + i, left), left);
        }
        x = res;
      }
      norm_row(x, (const T*)a.weight, a.weight_offset, a.eps, a.cols, (T*)a.out + r * a.out_row);
    }
  });
}

SG_INLINE vf activate(vf x, int act) {
  if (act == SG_SILU) return x / (expv(0.0f - x) + 1.0f);
  if (act == SG_GELU_TANH)
    return x * 0.5f * (tanhv((x * x * x * 0.044715f + x) * 0.7978845608028654f) + 1.0f);
  vf y;
  for (int i = 0; i < kLanes; i++) y[i] = 0.5f * x[i] * (1.0f + __builtin_erff(x[i] * 0.70710678f));
  return y;
}

template <class T>
static void gated_stage(SgTeam& team, const SgGated& a) {
  team.share_range(a.rows, 4, [&](int64_t from, int64_t to) {
    for (int64_t r = from; r < to; r++) {
      const T* x = (const T*)a.x + r * a.x_row;
      T* out = (T*)a.out + r * a.out_row;
      for (int i = 0; i < a.cols; i += kLanes) {
        const int left = a.cols - i;
        const vf gate = activate(load_upto(x + i, left), a.act);
        store_upto(out + i, gate * load_upto(x + a.cols + i, left), left);
      }
    }
  });
}

// Rotate one head from `in` to `out` (which may be the same); what is past rotary_dim is copied.
template <class I, class O, class C>
SG_INLINE void rope_head(const I* in, O* out, const C* cache, int head_dim, int rotary_dim,
                         bool neox) {
  const int half = rotary_dim / 2;
  if (neox) {
    for (int i = 0; i < half; i += kLanes) {
      const int left = half - i;
      const vf c = load_upto(cache + i, left), s = load_upto(cache + half + i, left);
      const vf x = load_upto(in + i, left), y = load_upto(in + half + i, left);
      store_upto(out + i, x * c - y * s, left);
      store_upto(out + half + i, y * c + x * s, left);
    }
  } else {
    for (int i = 0; i < half; i++) {
      const float c = get(cache + i), s = get(cache + half + i);
      const float x = get(in + 2 * i), y = get(in + 2 * i + 1);
      put(out + 2 * i, x * c - y * s);
      put(out + 2 * i + 1, y * c + x * s);
    }
  }
  if ((const void*)in != (const void*)out)
    for (int i = rotary_dim; i < head_dim; i++) put(out + i, get(in + i));
}

template <class T, class C>
static void rope_stage_typed(SgTeam& team, const SgRope& a) {
  team.share_range(a.tokens, 4, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const C* cache = (const C*)a.cache + a.positions[t] * a.cache_row;
      for (int h = 0; h < a.q_heads; h++) {
        T* q = (T*)a.q + t * a.q_token + h * a.q_head;
        rope_head(q, q, cache, a.head_dim, a.rotary_dim, a.neox);
      }
      for (int h = 0; a.k && h < a.k_heads; h++) {
        T* k = (T*)a.k + t * a.k_token + h * a.k_head;
        rope_head(k, k, cache, a.head_dim, a.rotary_dim, a.neox);
      }
    }
  });
}

template <class T>
static void rope_stage(SgTeam& team, const SgRope& a) {
  if (a.cache_f32)
    rope_stage_typed<T, float>(team, a);
  else
    rope_stage_typed<T, T>(team, a);
}

}  // namespace SG_ISA
