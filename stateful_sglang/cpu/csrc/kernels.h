// The kernels of one instruction set, as a table.
#pragma once
#include "abi.h"
#include "plan.h"
#include "team.h"

struct SgKernels {
  const char* name;
  int64_t (*attention_scratch)(const SgAttention&);
  int64_t (*linear_scratch)(const SgLinear&);
  int64_t (*decoder_scratch)(const SgDecoder&);
  int64_t (*decoder_shared)(const SgDecoder&);
  void (*attention)(SgTeam&, const SgAttention&, const SgAttnPlan&);
  void (*linear)(SgTeam&, const SgLinear&);
  void (*pack)(SgTeam&, int dtype, const void* weight, int64_t row_stride, int cols, int inner,
               bool interleave, void* out);
  void (*pack_int8)(SgTeam&, int dtype, const void* weight, int64_t row_stride, int cols, int inner,
                    bool interleave, void* out, float* scale);
  void (*norm)(SgTeam&, const SgNorm&);
  void (*rope)(SgTeam&, const SgRope&);
  void (*gated)(SgTeam&, const SgGated&);
  void (*decoder)(SgTeam&, const SgDecoder&, const SgAttnPlan&, char* shared);
};

extern const SgKernels sg_kernels_portable;
#if defined(__x86_64__)
extern const SgKernels sg_kernels_avx2;
extern const SgKernels sg_kernels_avx512;
#endif
