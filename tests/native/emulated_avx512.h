// The AVX-512 intrinsics that the kernels use, computed by SIMDe on any processor; for
// scripts/check-avx512. Included before everything else, so that the kernels take their AVX-512
// path while nothing of it reaches the compiler.
#pragma once
#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <string.h>

#define _IMMINTRIN_H_INCLUDED
#define _MM_FROUND_NO_EXC SIMDE_MM_FROUND_NO_EXC
typedef uint16_t __mmask16;

// What SIMDe 0.7 lacks, lane by lane.
#define EMULATED static inline
template <class To, class From>
EMULATED To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
struct Floats {
  float at[16];
};
struct Words32 {
  int32_t at[16];
};

EMULATED __m512i _mm512_cvtepu16_epi32(__m256i narrow) {
  uint16_t from[16];
  memcpy(from, &narrow, sizeof from);
  Words32 to;
  for (int i = 0; i < 16; i++) to.at[i] = from[i];
  return bits_as<__m512i>(to);
}
EMULATED __m512i _mm512_cvtepi8_epi32(__m128i narrow) {
  int8_t from[16];
  memcpy(from, &narrow, sizeof from);
  Words32 to;
  for (int i = 0; i < 16; i++) to.at[i] = from[i];
  return bits_as<__m512i>(to);
}
EMULATED __m512 _mm512_cvtepi32_ps(__m512i whole) {
  const Words32 from = bits_as<Words32>(whole);
  Floats to;
  for (int i = 0; i < 16; i++) to.at[i] = (float)from.at[i];
  return bits_as<__m512>(to);
}
EMULATED __m256bh _mm512_cvtneps_pbh(__m512 wide) {  // to nearest even
  const Floats from = bits_as<Floats>(wide);
  uint16_t to[16];
  for (int i = 0; i < 16; i++) {
    uint32_t u;
    memcpy(&u, &from.at[i], 4);
    to[i] = from.at[i] != from.at[i] ? 0x7fc0 : (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  __m256bh result;
  memcpy(&result, to, sizeof to);
  return result;
}
EMULATED float _mm512_reduce_add_ps(__m512 v) {
  Floats f = bits_as<Floats>(v);
  for (int w = 8; w > 0; w /= 2)
    for (int i = 0; i < w; i++) f.at[i] += f.at[i + w];
  return f.at[0];
}
EMULATED float _mm512_reduce_max_ps(__m512 v) {
  const Floats f = bits_as<Floats>(v);
  float most = f.at[0];
  for (int i = 1; i < 16; i++) most = f.at[i] > most ? f.at[i] : most;
  return most;
}
EMULATED __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* p) {
  Words32 to = {};
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy(&to.at[i], (const char*)p + 4 * i, 4);
  return bits_as<__m512i>(to);
}
EMULATED void _mm512_mask_storeu_epi32(void* p, __mmask16 mask, __m512i v) {
  const Words32 from = bits_as<Words32>(v);
  for (int i = 0; i < 16; i++)
    if (mask >> i & 1) memcpy((char*)p + 4 * i, &from.at[i], 4);
}

// The kernels now find AVX-512 where they look for it.
#define __AVX2__ 1
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512BF16__ 1
