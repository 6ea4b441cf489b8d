// All decoder layers of a dense model in one parallel region.
//
// Llama, Mistral, Qwen2 (biases), Qwen3 (norms of q and k) and Gemma-style layers (norms of what is
// added, logit caps) are one sequence of stages with parts left out. The residual stays in float32;
// what a stage hands to a matrix product or to the pool is rounded to the model's dtype.
#pragma once
#include <time.h>

#include "attention.h"
#include "linear.h"

namespace SG_ISA {

template <class T>
struct DecoderBuffers {
  float *residual, *qkv, *added;
  T *q, *attn, *act;
  int64_t lay(const SgDecoder& d, char* base) {
    char* at = base;
    auto take = [&](int64_t bytes) {
      char* r = at;
      at += (bytes + 127) / 64 * 64;
      return r;
    };
    const int64_t n = d.tokens;
    residual = (float*)take(n * d.hidden * 4);
    qkv = (float*)take(n * (d.q_heads + 2 * d.kv_heads) * d.head_dim * 4);
    q = (T*)take(n * d.q_heads * d.head_dim * sizeof(T));
    attn = (T*)take(n * d.q_heads * d.head_dim * sizeof(T));
    act = (T*)take(n * d.inter * sizeof(T));
    added = (float*)take(n * d.hidden * 4);
    return at - base;
  }
};

template <class T>
SG_INLINE SgAttention decoder_attention(const SgDecoder& d, const SgLayer& l, const T* q, T* out) {
  SgAttention a = {};
  a.dtype = d.dtype;
  a.batch = d.batch;
  a.q_heads = d.q_heads;
  a.kv_heads = d.kv_heads;
  a.head_dim = d.head_dim;
  a.tokens = d.tokens;
  a.q = q;
  a.out = out;
  a.q_token = a.out_token = (int64_t)d.q_heads * d.head_dim;
  a.q_head = a.out_head = d.head_dim;
  a.k_pool = l.k_pool;
  a.v_pool = l.v_pool;
  a.k_slot = l.k_slot;
  a.k_head = l.k_head;
  a.v_slot = l.v_slot;
  a.v_head = l.v_head;
  a.req_to_token = d.req_to_token;
  a.req_stride = d.req_stride;
  a.req_index = d.req_index;
  a.seq_lens = d.seq_lens;
  a.q_starts = d.q_starts;
  a.scale = l.scale;
  a.logit_cap = l.logit_cap;
  a.window = l.window;
  a.causal = 1;
  a.mask = d.mask;
  a.mask_offsets = d.mask_offsets;
  return a;
}

// Norm (if any), rotation and rounding of one head of q or k.
template <class T>
SG_INLINE void finish_head(const SgDecoder& d, const SgLayer& l, float* x, const float* norm,
                           int64_t position, T* out) {
  if (norm) norm_row(x, norm, 0.0f, d.eps, d.head_dim, x);
  if (l.rope_cache_f32)
    rope_head(x, out, (const float*)l.rope_cache + position * l.rope_row, d.head_dim, d.rotary_dim,
              d.neox);
  else
    rope_head(x, out, (const T*)l.rope_cache + position * l.rope_row, d.head_dim, d.rotary_dim,
              d.neox);
}

// The projection's rows become q, and k and v in their slots; heads are shared among the team.
template <class T>
static void rotate_and_write_stage(SgTeam& team, const SgDecoder& d, const SgLayer& l,
                                   const DecoderBuffers<T>& b) {
  const int heads = d.q_heads + 2 * d.kv_heads, dim = d.head_dim;
  const int64_t items = (int64_t)d.tokens * heads;
  team.share_range(items, 5, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      const int64_t t = i / heads;
      const int h = (int)(i % heads);
      float* x = b.qkv + i * dim;
      if (h < d.q_heads) {
        finish_head(d, l, x, l.q_norm, d.positions[t], b.q + (t * d.q_heads + h) * dim);
      } else if (h < d.q_heads + d.kv_heads) {
        T* k = (T*)l.k_pool + d.out_loc[t] * l.k_slot + (h - d.q_heads) * l.k_head;
        finish_head(d, l, x, l.k_norm, d.positions[t], k);
      } else {
        T* v = (T*)l.v_pool + d.out_loc[t] * l.v_slot + (h - d.q_heads - d.kv_heads) * l.v_head;
        for (int j = 0; j < dim; j += kLanes) store_upto(v + j, load_upto(x + j, dim - j), dim - j);
      }
    }
  });
}

// residual += norm(added)
static void add_normed_stage(SgTeam& team, const SgDecoder& d, const float* norm, float* added,
                             float* residual) {
  team.share_range(d.tokens, 4, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      float *x = added + t * d.hidden, *r = residual + t * d.hidden;
      norm_row(x, norm, 0.0f, d.eps, d.hidden, x);
      for (int i = 0; i < d.hidden; i += kLanes)
        store_upto(r + i, load_upto(r + i, d.hidden - i) + load_upto(x + i, d.hidden - i),
                   d.hidden - i);
    }
  });
}

// What each part of a pass took, waiting for the other threads included.
class PartClock {
 public:
  SG_INLINE_MEMBER PartClock(const SgDecoder& d, const SgTeam& team)
      : total_(team.id == 0 ? d.clock : nullptr), last_(total_ ? now() : 0) {}
  SG_INLINE_MEMBER void end(SgPart part) {
    if (!total_) return;
    const int64_t at = now();
    total_[part] += at - last_;
    last_ = at;
  }

 private:
  static SG_INLINE_MEMBER int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * INT64_C(1000000000) + t.tv_nsec;
  }
  int64_t *total_, last_;
};

template <class T>
static void decoder_run(SgTeam& team, const SgDecoder& d, const SgAttnPlan& plan, char* shared) {
  DecoderBuffers<T> b;
  b.lay(d, shared);
  PartClock clock(d, team);
  const int width = (d.q_heads + 2 * d.kv_heads) * d.head_dim;
  team.share_range(d.tokens, 8, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++) {
      const T* x = (const T*)d.embeds + t * d.embeds_row;
      for (int i = 0; i < d.hidden; i += kLanes)
        store_upto(b.residual + t * d.hidden + i, load_upto(x + i, d.hidden - i), d.hidden - i);
    }
  });

  // A product of the residual, normalised, or of a buffer in the model's dtype.
  auto product = [&](const void* x, int inner, const float* norm, const void* weight,
                     const void* scale, const void* bias, int cols, int epilogue, void* out,
                     int out_row, bool out_f32) {
    SgLinear p = {};
    p.dtype = d.dtype;
    p.rows = d.tokens;
    p.cols = cols;
    p.inner = inner;
    p.x = x;
    p.x_row = inner;
    p.x_f32 = norm != nullptr;
    p.norm = norm;
    p.norm_eps = d.eps;
    p.weight = weight;
    p.scale = scale;
    p.bias = bias;
    p.epilogue = epilogue;
    p.act = d.act;
    p.out = out;
    p.out_row = out_row;
    p.out_f32 = out_f32;
    linear_stage<T>(team, p);
  };
  auto add = [&](const void* x, int inner, const void* weight, const void* scale, const void* bias,
                 const float* norm) {
    product(x, inner, nullptr, weight, scale, bias, d.hidden, norm ? SG_STORE : SG_ADD,
            norm ? b.added : b.residual, d.hidden, true);
    if (norm) add_normed_stage(team, d, norm, b.added, b.residual);
  };

  clock.end(SG_ENDS);
  for (int i = 0; i < d.layers; i++) {
    const SgLayer& l = d.layer[i];
    product(b.residual, d.hidden, l.input_norm, l.qkv, l.qkv_scale, l.qkv_bias, width, SG_STORE,
            b.qkv, width, true);
    clock.end(SG_QKV);
    rotate_and_write_stage<T>(team, d, l, b);
    clock.end(SG_ROTATE);
    const SgAttention a = decoder_attention<T>(d, l, b.q, b.attn);
    attention_stage<T>(team, a, plan);
    clock.end(SG_ATTEND);
    add(b.attn, d.q_heads * d.head_dim, l.o, l.o_scale, l.o_bias, l.attn_out_norm);
    clock.end(SG_O);
    product(b.residual, d.hidden, l.post_norm, l.gate_up, l.gate_up_scale, l.gate_up_bias,
            2 * d.inter, SG_GATED, b.act, d.inter, false);
    clock.end(SG_GATE_UP);
    add(b.act, d.inter, l.down, l.down_scale, l.down_bias, l.mlp_out_norm);
    clock.end(SG_DOWN);
  }

  team.share_range(d.tokens, 4, [&](int64_t from, int64_t to) {
    for (int64_t t = from; t < to; t++)
      norm_row(b.residual + t * d.hidden, d.final_norm, 0.0f, d.eps, d.hidden,
               (T*)d.out + t * d.out_row);
  });
  clock.end(SG_ENDS);
}

template <class T>
static int64_t decoder_thread_bytes(const SgDecoder& d) {
  AttnScratch<T> sc;
  SgLayer none = {};
  SgAttention a = decoder_attention<T>(d, none, nullptr, nullptr);
  int64_t most = sc.lay(a, nullptr);
  const int inners[] = {d.hidden, d.q_heads * d.head_dim, d.inter};
  for (int inner : inners) {
    const int64_t bytes = linear_scratch<T>(d.tokens, inner, d.layers && d.layer->qkv_scale);
    most = bytes > most ? bytes : most;
  }
  return most;
}

}  // namespace SG_ISA
