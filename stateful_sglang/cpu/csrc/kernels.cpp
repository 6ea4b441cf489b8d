// Compiled once per instruction set: see build flags in extension.py.
#include "kernels.h"

#include "decoder.h"
#include "rows.h"

namespace SG_ISA {

#define SG_BY_TYPE(dtype, call_f32, call_bf16) \
  if ((dtype) == SG_F32)                       \
    call_f32;                                  \
  else                                         \
    call_bf16;

static int64_t attention_scratch(const SgAttention& a) {
  AttnScratch<float> f;
  AttnScratch<bf16> h;
  return a.dtype == SG_F32 ? f.lay(a, nullptr) : h.lay(a, nullptr);
}
static int64_t linear_scratch_any(const SgLinear& a) {
  return a.dtype == SG_F32 ? linear_scratch<float>(a.rows, a.inner, a.scale)
                           : linear_scratch<bf16>(a.rows, a.inner, a.scale);
}
static void attention(SgTeam& t, const SgAttention& a, const SgAttnPlan& p) {
  if (a.k_new) {
    SG_BY_TYPE(a.dtype, write_kv_stage<float>(t, a), write_kv_stage<bf16>(t, a))
  }
  SG_BY_TYPE(a.dtype, attention_stage<float>(t, a, p), attention_stage<bf16>(t, a, p))
}
static void linear(SgTeam& t, const SgLinear& a) {
  SG_BY_TYPE(a.dtype, linear_stage<float>(t, a), linear_stage<bf16>(t, a))
}
static void pack(SgTeam& t, int dtype, const void* weight, int64_t row_stride, int cols, int inner,
                 bool interleave, void* out) {
  SG_BY_TYPE(
      dtype,
      pack_stage(t, (const float*)weight, row_stride, cols, inner, interleave, (uint32_t*)out),
      pack_stage(t, (const bf16*)weight, row_stride, cols, inner, interleave, (uint32_t*)out))
}
static void pack_int8(SgTeam& t, int dtype, const void* weight, int64_t row_stride, int cols,
                      int inner, bool interleave, void* out, float* scale) {
  SG_BY_TYPE(dtype,
             pack_int8_stage(t, (const float*)weight, row_stride, cols, inner, interleave,
                             (int8_t*)out, scale),
             pack_int8_stage(t, (const bf16*)weight, row_stride, cols, inner, interleave,
                             (int8_t*)out, scale))
}
static void norm(SgTeam& t, const SgNorm& a) {
  SG_BY_TYPE(a.dtype, norm_stage<float>(t, a), norm_stage<bf16>(t, a))
}
static void rope(SgTeam& t, const SgRope& a) {
  SG_BY_TYPE(a.dtype, rope_stage<float>(t, a), rope_stage<bf16>(t, a))
}
static void gated(SgTeam& t, const SgGated& a) {
  SG_BY_TYPE(a.dtype, gated_stage<float>(t, a), gated_stage<bf16>(t, a))
}

static int64_t decoder_scratch(const SgDecoder& d) {
  return d.dtype == SG_F32 ? decoder_thread_bytes<float>(d) : decoder_thread_bytes<bf16>(d);
}
static int64_t decoder_shared(const SgDecoder& d) {
  DecoderBuffers<float> f;
  DecoderBuffers<bf16> h;
  return d.dtype == SG_F32 ? f.lay(d, nullptr) : h.lay(d, nullptr);
}
static void decoder(SgTeam& t, const SgDecoder& d, const SgAttnPlan& p, char* shared) {
  SG_BY_TYPE(d.dtype, decoder_run<float>(t, d, p, shared), decoder_run<bf16>(t, d, p, shared))
}

}  // namespace SG_ISA

#define SG_JOIN2(a, b) a##b
#define SG_JOIN(a, b) SG_JOIN2(a, b)
#define SG_TEXT2(a) #a
#define SG_TEXT(a) SG_TEXT2(a)

using namespace SG_ISA;
extern const SgKernels SG_JOIN(sg_kernels_, SG_ISA) = {
    SG_TEXT(SG_ISA),
    attention_scratch,
    linear_scratch_any,
    decoder_scratch,
    decoder_shared,
    attention,
    linear,
    pack,
    pack_int8,
    norm,
    rope,
    gated,
    decoder,
};
