// The C interface between Python (ctypes, ops.py) and the kernels.
//
// Plain structs of pointers, strides in elements and sizes: no torch and no Python headers, so that
// the library compiles in seconds, outlives a torch upgrade and can be tested without either.
// ops.py mirrors every struct; sgl_cpu_abi() guards against the two drifting apart.
#pragma once
#include <stdint.h>

enum SgDtype { SG_F32 = 0, SG_BF16 = 1 };

// One attention call over a token-indexed KV pool; extend, decode and verify alike.
typedef struct {
  int32_t dtype;  // SgDtype of q, k, v, pools and out
  int32_t batch, q_heads, kv_heads, head_dim;
  int32_t tokens;             // rows of q
  const void* q;              // [tokens, q_heads, head_dim]
  int64_t q_token, q_head;    // strides of q
  const void *k_new, *v_new;  // [tokens, kv_heads, head_dim], or null: already in the pool
  int64_t kn_token, kn_head, vn_token, vn_head;
  const int64_t* out_loc;  // [tokens] slots of k_new and v_new
  void *k_pool, *v_pool;   // [slots, kv_heads, head_dim]
  int64_t k_slot, k_head, v_slot, v_head;
  const int32_t* req_to_token;  // [requests, req_stride] slot of each position
  int64_t req_stride;
  const int64_t* req_index;  // [batch] row of req_to_token
  const int64_t* seq_lens;   // [batch] positions in all, the new ones included
  const int64_t* q_starts;   // [batch + 1] first row of q of each request
  void* out;                 // [tokens, q_heads, head_dim]
  int64_t out_token, out_head;
  float scale;
  float logit_cap;              // 0: none
  int64_t window;               // keys at position >= query - window; < 0: none
  int32_t causal;               // 0: every key of the request
  const uint8_t* mask;          // per request [n, n] of its n new rows, or null: chain
  const int64_t* mask_offsets;  // [batch] first element of a request's mask; < 0: chain
} SgAttention;

enum SgEpilogue {
  SG_STORE = 0,
  SG_GATED = 1,  // weight packed gate and up interleaved: out = act(gate) * up, N / 2 columns
  SG_ADD = 2,    // out (float32) += result
};
enum SgAct { SG_SILU = 0, SG_GELU_TANH = 1, SG_GELU = 2 };

// out[M, N] = epilogue(norm(x)[M, K] @ W.T + bias), W packed by sgl_cpu_pack.
typedef struct {
  int32_t dtype;              // of x (unless x_f32), weight and bias
  int32_t rows, cols, inner;  // M, N (before gating), K
  const void* x;
  int64_t x_row;
  int32_t x_f32;     // x is float32 whatever the dtype
  const void* norm;  // RMSNorm weight [K] (float32), or null: x as it is
  float norm_eps;
  const void* weight;  // packed
  const void* scale;   // [N up to a multiple of 32] float32: the weight is int8; or null
  const void* bias;    // [N] in dtype, in packed column order, or null
  int32_t epilogue, act;
  void* out;
  int64_t out_row;
  int32_t out_f32;  // out is float32 whatever the dtype
} SgLinear;

typedef struct {
  int32_t dtype;
  int32_t rows, cols;
  const void* x;  // [rows, cols]
  int64_t x_row;
  void* residual;  // [rows, cols] or null; becomes x + residual
  int64_t residual_row;
  const void* weight;        // [cols] in dtype
  float eps, weight_offset;  // Gemma multiplies by 1 + weight
  void* out;
  int64_t out_row;
} SgNorm;

typedef struct {
  int32_t dtype;
  int32_t tokens, q_heads, k_heads, head_dim, rotary_dim, neox;
  const int64_t* positions;
  const void* cache;  // [positions, rotary_dim], cosines then sines
  int32_t cache_f32;  // else in dtype
  int64_t cache_row;
  void *q, *k;  // rotated in place; k may be null
  int64_t q_token, q_head, k_token, k_head;
} SgRope;

typedef struct {
  int32_t dtype;
  int32_t rows, cols;  // cols of the result; x has twice as many
  const void* x;
  int64_t x_row;
  void* out;
  int64_t out_row;
  int32_t act;
} SgGated;

// Draw one token per row from probabilities filtered by top-k, top-p and min-p.
typedef struct {
  int32_t rows, vocab;
  const float* probs;  // [rows, vocab], any positive scale
  int64_t row_stride;
  const float *top_p, *min_p;      // [rows] or null
  const int64_t* top_k;            // [rows] or null; outside 1..vocab: all
  const double* uniform;           // [rows] in [0, 1), or null: keyed by seed and position
  const int64_t *seed, *position;  // [rows]
  int64_t* out;                    // [rows]
} SgSample;

// One decoder layer; null pointers leave a part out.
typedef struct {
  const float *input_norm, *post_norm;  // [hidden] float32, any offset folded in
  const void *qkv, *qkv_bias, *o, *o_bias, *gate_up, *gate_up_bias, *down, *down_bias;  // packed
  const void *qkv_scale, *o_scale, *gate_up_scale, *down_scale;  // see SgLinear; all or none
  const float *q_norm, *k_norm;                                  // [head_dim] float32
  const float *attn_out_norm, *mlp_out_norm;  // norms of what is added to the residual (Gemma)
  void *k_pool, *v_pool;
  int64_t k_slot, k_head, v_slot, v_head;
  const void* rope_cache;
  int32_t rope_cache_f32;
  int64_t rope_row;
  float scale, logit_cap;
  int64_t window;
} SgLayer;

// All decoder layers over one batch: hidden states in, normalised hidden states out.
typedef struct {
  int32_t dtype;
  int32_t layers, hidden, inter, q_heads, kv_heads, head_dim, rotary_dim, neox, act;
  float eps;
  const SgLayer* layer;
  const float* final_norm;  // [hidden]
  int32_t tokens, batch;
  const void* embeds;  // [tokens, hidden]
  int64_t embeds_row;
  const int64_t* positions;
  const int64_t* out_loc;
  const int32_t* req_to_token;
  int64_t req_stride;
  const int64_t *req_index, *seq_lens, *q_starts;
  const uint8_t* mask;
  const int64_t* mask_offsets;
  void* out;  // [tokens, hidden] in dtype
  int64_t out_row;
  int64_t* clock;  // [SG_PARTS] nanoseconds of one thread are added, or null
} SgDecoder;

enum SgPart { SG_ENDS = 0, SG_QKV, SG_ROTATE, SG_ATTEND, SG_O, SG_GATE_UP, SG_DOWN, SG_PARTS };
