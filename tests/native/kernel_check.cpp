// The kernels against double precision without torch or Python, for processors that are emulated.
// Exit status 1 and a line per failure; see scripts/check-aarch64.
#include <math.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

#include "../../stateful_sglang/cpu/csrc/abi.h"

extern "C" {
const char* sg_select(const char*);
void sg_attention(const SgAttention*);
void sg_linear(const SgLinear*);
int64_t sg_packed_bytes(int, int, int);
void sg_pack(int, const void*, int64_t, int, int, int, void*);
int64_t sg_packed_int8_bytes(int, int);
void sg_pack_int8(int, const void*, int64_t, int, int, int, void*, float*);
void sg_sample(const SgSample*);
}

static int failures = 0;
static std::mt19937 rng(1);

static float rounded(float x, int dtype) {
  if (dtype == SG_F32) return x;
  uint32_t u;
  memcpy(&u, &x, 4);
  u = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
  memcpy(&x, &u, 4);
  return x;
}

// Values in the dtype's storage, and as floats.
struct Array {
  int dtype;
  std::vector<float> value;
  std::vector<uint16_t> half;
  Array(int dtype, size_t n) : dtype(dtype), value(n), half(n) {
    std::normal_distribution<float> normal;
    for (size_t i = 0; i < n; i++) {
      value[i] = rounded(normal(rng), dtype);
      uint32_t u;
      memcpy(&u, &value[i], 4);
      half[i] = static_cast<uint16_t>(u >> 16);
    }
  }
  void* data() { return dtype == SG_F32 ? static_cast<void*>(value.data()) : half.data(); }
  float at(size_t i) const {
    if (dtype == SG_F32) return value[i];
    const uint32_t u = static_cast<uint32_t>(half[i]) << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
  }
};

static void expect(const char* what, double error, double limit) {
  if (!(error < limit)) {
    printf("FAIL %s: error %g, limit %g\n", what, error, limit);
    failures++;
  }
}

static void check_attention(int dtype, int n_new, int seq, int q_heads, int kv_heads, int dim,
                            double cap, int64_t window) {
  const int slots = seq + 3, group = q_heads / kv_heads;
  Array q(dtype, n_new * q_heads * dim), k(dtype, slots * kv_heads * dim);
  Array v(dtype, slots * kv_heads * dim), out(dtype, n_new * q_heads * dim);
  std::vector<int32_t> table(seq);
  for (int i = 0; i < seq; i++) table[i] = (i * 7 + 2) % slots;
  if (slots % 7 == 0)
    for (int i = 0; i < seq; i++) table[i] = i;
  const int64_t index = 0, length = seq, starts[] = {0, n_new};
  SgAttention a = {};
  a.dtype = dtype;
  a.batch = 1;
  a.q_heads = q_heads;
  a.kv_heads = kv_heads;
  a.head_dim = dim;
  a.tokens = n_new;
  a.q = q.data();
  a.out = out.data();
  a.q_token = a.out_token = q_heads * dim;
  a.q_head = a.out_head = a.k_head = a.v_head = dim;
  a.k_pool = k.data();
  a.v_pool = v.data();
  a.k_slot = a.v_slot = kv_heads * dim;
  a.req_to_token = table.data();
  a.req_stride = seq;
  a.req_index = &index;
  a.seq_lens = &length;
  a.q_starts = starts;
  a.scale = 1.0f / sqrtf(dim);
  a.logit_cap = cap;
  a.window = window;
  a.causal = 1;
  sg_attention(&a);
  double worst = 0;
  for (int t = 0; t < n_new; t++)
    for (int h = 0; h < q_heads; h++) {
      const int position = seq - n_new + t;
      std::vector<double> p(position + 1, 0.0), sum(dim, 0.0);
      double total = 0;
      for (int j = 0; j <= position; j++) {
        if (window >= 0 && j < position - window) continue;
        double s = 0;
        for (int d = 0; d < dim; d++)
          s += static_cast<double>(q.value[(t * q_heads + h) * dim + d]) *
               k.value[(table[j] * kv_heads + h / group) * dim + d];
        s *= a.scale;
        if (cap > 0) s = cap * tanh(s / cap);
        p[j] = exp(s);
        total += p[j];
      }
      for (int j = 0; j <= position; j++)
        for (int d = 0; d < dim; d++)
          sum[d] += p[j] / total * v.value[(table[j] * kv_heads + h / group) * dim + d];
      for (int d = 0; d < dim; d++)
        worst = fmax(worst, fabs(sum[d] - out.at((t * q_heads + h) * dim + d)));
    }
  expect("attention", worst, dtype == SG_F32 ? 3e-6 : 1.2e-2);
}

static void check_linear(int dtype, int rows, int cols, int inner, bool int8) {
  Array x(dtype, rows * inner), w(dtype, cols * inner);
  std::vector<float> out(rows * cols, NAN), scale((cols + 31) / 32 * 32);
  const int64_t bytes =
      int8 ? sg_packed_int8_bytes(cols, inner) : sg_packed_bytes(dtype, cols, inner);
  std::vector<int8_t> packed(bytes + 64);
  if (int8) {
    sg_pack_int8(dtype, w.data(), inner, cols, inner, 0, packed.data(), scale.data());
    for (int c = 0; c < cols; c++)  // From here on the weight is what it was rounded to.
      for (int i = 0; i < inner; i++) {
        const float rounded = packed[(c / 32 * inner + i) * 32 + c % 32] * scale[c];
        expect("rounding", fabs(rounded - w.value[c * inner + i]) / scale[c], 0.5001);
        w.value[c * inner + i] = rounded;
      }
  } else {
    sg_pack(dtype, w.data(), inner, cols, inner, 0, packed.data());
  }
  SgLinear a = {};
  a.dtype = dtype;
  a.rows = rows;
  a.cols = cols;
  a.inner = inner;
  a.x = x.data();
  a.x_row = inner;
  a.weight = packed.data();
  a.scale = int8 ? scale.data() : nullptr;
  a.out = out.data();
  a.out_row = cols;
  a.out_f32 = 1;
  sg_linear(&a);
  double worst = 0;
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) {
      double want = 0;
      for (int i = 0; i < inner; i++)
        want += static_cast<double>(x.value[r * inner + i]) * w.value[c * inner + i];
      worst = fmax(worst, fabs(want - out[r * cols + c]) / sqrt(inner));
    }
  // The sum runs in order: its error grows with its length.
  expect(int8 ? "int8 linear" : "linear", worst, 3e-6 * sqrt(fmax(1.0, inner / 66.0)));
}

static void check_sample() {
  const float p[] = {0.1f, 0.4f, 0.2f, 0.3f};
  const int64_t k = 2;
  for (int i = 0; i < 100; i++) {
    const double u = i / 100.0;
    int64_t out = -1;
    SgSample a = {};
    a.rows = 1;
    a.vocab = 4;
    a.probs = p;
    a.top_k = &k;
    a.uniform = &u;
    a.out = &out;
    sg_sample(&a);
    expect("sample", out == (u < 0.4 / 0.7 ? 1 : 3) ? 0 : 1, 0.5);
  }
}

int main() {
  printf("kernels: %s\n", sg_select(""));
  for (int dtype : {SG_F32, SG_BF16}) {
    for (int seq : {1, 31, 128, 129, 300})
      for (int n_new : {1, 3, 17})
        if (n_new <= seq) check_attention(dtype, n_new, seq, 6, 2, 64, 0, -1);
    check_attention(dtype, 40, 200, 4, 4, 34, 2.0, 50);
    check_attention(dtype, 5, 140, 8, 1, 80, 0, 0);
    for (int rows : {1, 3, 4, 5, 8, 13, 30})
      for (bool int8 : {false, true}) {
        check_linear(dtype, rows, 70, 66, int8);
        check_linear(dtype, rows, 40, 600, int8);
      }
  }
  check_sample();
  printf(failures ? "%d failures\n" : "all checks passed\n", failures);
  return failures != 0;
}
