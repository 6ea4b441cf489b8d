// Vectors of floats, one width per instruction set, in the compiler's own vector types; intrinsics
// only where they are worth it (AVX-512: bf16 dot products, exponent scaling; both: conversions,
// reductions, transposition).
//
// SG_ISA names the namespace of this compilation and SG_LANES its width.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace SG_ISA {

constexpr int kLanes = SG_LANES;
typedef float vf __attribute__((vector_size(SG_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(SG_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(SG_LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(SG_LANES * 2)));
typedef uint16_t bf16;

#define SG_INLINE static inline __attribute__((always_inline))
#define SG_INLINE_MEMBER inline __attribute__((always_inline))

SG_INLINE vf splat(float x) {  // `vf{} + x` would add: 0 + -0 is not -0
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (vf)_mm256_set1_ps(x);
#else
  vf v;
  for (int i = 0; i < kLanes; i++) v[i] = x;
  return v;
#endif
}
SG_INLINE vu splat_bits(uint32_t x) { return vu{} + x; }
SG_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
SG_INLINE vf vmin(vf a, vf b) { return a < b ? a : b; }

SG_INLINE vf load(const float* p) {
  vf v;
  memcpy(&v, p, sizeof v);
  return v;
}
SG_INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }
SG_INLINE vu load_bits(const uint32_t* p) {
  vu v;
  memcpy(&v, p, sizeof v);
  return v;
}
SG_INLINE void store_bits(uint32_t* p, vu v) { memcpy(p, &v, sizeof v); }
SG_INLINE vu widen(const uint16_t* p) {
#if defined(__AVX512F__)  // GCC 12 would convert by halves
  return (vu)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  return (vu)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  vh h;
  memcpy(&h, p, sizeof h);
  return __builtin_convertvector(h, vu);
#endif
}
SG_INLINE vf load(const bf16* p) { return (vf)(widen(p) << 16); }
SG_INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  vf v;
  for (int i = 0; i < kLanes; i++) v[i] = p[i];
  return v;
#endif
}

// Round to nearest even; NaN stays NaN.
SG_INLINE void store(bf16* p, vf v) {
#if defined(__AVX512BF16__)
  __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &h, sizeof h);
#else
  vu u = (vu)v;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  rounded = (vu)(v != v) ? splat_bits(0x7fc0u) : rounded;
#if defined(__AVX2__) && SG_LANES == 8
  const __m256i twice = _mm256_packus_epi32((__m256i)rounded, (__m256i)rounded);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(_mm256_permute4x64_epi64(twice, 0x08)));
#else
  vh h = __builtin_convertvector(rounded, vh);
  memcpy(p, &h, sizeof h);
#endif
#endif
}

SG_INLINE float get(const float* p) { return *p; }
SG_INLINE float get(const bf16* p) {
  uint32_t u = (uint32_t)*p << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
SG_INLINE void put(float* p, float x) { *p = x; }
SG_INLINE void put(bf16* p, float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  *p = x != x ? 0x7fc0 : (bf16)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

// The first n lanes (0 < n < kLanes); the others are zero.
template <class T>
SG_INLINE vf load_part(const T* p, int n) {
  T tmp[kLanes] = {};
  memcpy(tmp, p, n * sizeof(T));
  return load(tmp);
}
template <class T>
SG_INLINE void store_part(T* p, vf v, int n) {
  T tmp[kLanes];
  store(tmp, v);
  memcpy(p, tmp, n * sizeof(T));
}
template <class T>
SG_INLINE vf load_upto(const T* p, int n) {
  return n >= kLanes ? load(p) : load_part(p, n);
}
template <class T>
SG_INLINE void store_upto(T* p, vf v, int n) {
  if (n >= kLanes)
    store(p, v);
  else
    store_part(p, v, n);
}

SG_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#elif defined(__AVX2__)
  __m128 t = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
#else
  float t[kLanes];
  store(t, v);
  for (int w = kLanes / 2; w > 0; w /= 2)
    for (int i = 0; i < w; i++) t[i] += t[i + w];
  return t[0];
#endif
}
SG_INLINE float max_of(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#elif defined(__AVX2__)
  // A NaN may or may not show here; it shows in the sum of the exponentials.
  __m128 t = _mm_max_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
#else
  float t[kLanes];
  store(t, v);
  float m = t[0];
  for (int i = 1; i < kLanes; i++) m = t[i] > m ? t[i] : m;
  return m;
#endif
}

// A "word" is 32 bits of the inner dimension: one float, or two bf16 with the earlier one low.
template <class T>
struct Words {
  static constexpr int per = 4 / sizeof(T);
};
template <class T>
SG_INLINE int words(int n) {
  return (n + Words<T>::per - 1) / Words<T>::per;
}

// 2**r for r in [-1/2, 1/2]. Relative least-maximum fits, errors 2.8e-6 (for bf16 results) and
// 2e-9.
template <bool kExact>
SG_INLINE vf exp2_fraction(vf r) {
  vf p;
  if (kExact) {
    p = splat(0.000153533576f);
    p = p * r + 0.001339887569f;
    p = p * r + 0.009618437385f;
    p = p * r + 0.055503324671f;
    p = p * r + 0.240226479132f;
    p = p * r + 0.693147202858f;
  } else {
    p = splat(0.0095828456f);
    p = p * r + 0.0559064346f;
    p = p * r + 0.2402409883f;
    p = p * r + 0.6931241916f;
  }
  return p * r + 1.0f;
}

// 2**x for any x; 0 below the float range.
template <bool kExact>
SG_INLINE vf exp2v(vf x) {
  x = x > 128.0f ? splat(128.0f) : x;  // written so that NaN stays NaN
  x = x < -200.0f ? splat(-200.0f) : x;
#if defined(__AVX512F__)
  vf n = (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = splat(12582912.0f);
  vf n = (x + magic) - magic;
#endif
  const vf p = exp2_fraction<kExact>(x - n);
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  vi e = __builtin_convertvector(n, vi);
  // In two steps: 2**n alone overflows at n = 128 although p * 2**n may not.
  vi half = e >> 1;
  vf scaled = (p * (vf)((half + 127) << 23)) * (vf)((e - half + 127) << 23);
  return x < -149.5f ? splat(0.0f) : scaled;
#endif
}
// The same for x up to about 0, as a softmax has it: 0 below the normal floats.
template <bool kExact>
SG_INLINE vf exp2_down(vf x) {
#if defined(__AVX512F__)
  return exp2v<kExact>(x);
#else
  const vf low = splat(-126.0f), magic = splat(12582912.0f);
  const vf clamped = x < low ? low : x;  // written so that NaN stays NaN
  const vf shifted = clamped + magic;    // its low bits are the nearest whole number
  const vf p = exp2_fraction<kExact>(clamped - (shifted - magic));
  const vf scaled = (vf)((vi)p + ((vi)shifted << 23));
  return x < low ? vf{} : scaled;
#endif
}
SG_INLINE vf expv(vf x) { return exp2v<true>(x * 1.44269504088896341f); }
SG_INLINE float exp2s(float x) { return exp2v<true>(splat(x))[0]; }

// Rational below 0.625 (Cephes tanhf), exponential above: relative error near 1e-7 everywhere.
SG_INLINE vf tanhv(vf x) {
  vf z = x * x;
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  vf small = p * z * x + x;
  vf a = x < 0.0f ? -x : x;
  vf big = 1.0f - 2.0f / (expv(a + a) + 1.0f);
  big = x < 0.0f ? -big : big;
  return a < 0.625f ? small : big;
}

// Transpose up to 16 rows of words: out[i * out_stride + r] = rows[r][i] for r < n, i < len.
// Lanes n..width are written as zero, and up to 7 words behind a row may be overwritten: rows are
// written in order, so that it matters behind the last one only.
#if defined(__AVX512F__)
SG_INLINE void transpose16(const uint32_t* const* rows, int n, int len, uint32_t* out,
                           int out_stride, int width) {
  const __mmask16 out_mask = (__mmask16)((1u << width) - 1u);
  for (int i0 = 0; i0 < len; i0 += 16) {
    const int part = len - i0 < 16 ? len - i0 : 16;
    const __mmask16 in_mask = (__mmask16)((1u << part) - 1u);
    __m512i r[16], t[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
      r[j] = j < n ? _mm512_maskz_loadu_epi32(in_mask, rows[j] + i0) : _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int j = 0; j < 8; j++) {
      t[2 * j] = _mm512_unpacklo_epi32(r[2 * j], r[2 * j + 1]);
      t[2 * j + 1] = _mm512_unpackhi_epi32(r[2 * j], r[2 * j + 1]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      r[4 * j] = _mm512_unpacklo_epi64(t[4 * j], t[4 * j + 2]);
      r[4 * j + 1] = _mm512_unpackhi_epi64(t[4 * j], t[4 * j + 2]);
      r[4 * j + 2] = _mm512_unpacklo_epi64(t[4 * j + 1], t[4 * j + 3]);
      r[4 * j + 3] = _mm512_unpackhi_epi64(t[4 * j + 1], t[4 * j + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[j] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0x88);
      t[j + 4] = _mm512_shuffle_i32x4(r[j], r[j + 4], 0xdd);
      t[j + 8] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0x88);
      t[j + 12] = _mm512_shuffle_i32x4(r[j + 8], r[j + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      r[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
      r[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
      r[j + 4] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0x88);
      r[j + 12] = _mm512_shuffle_i32x4(t[j + 4], t[j + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++)
      if (j < part) _mm512_mask_storeu_epi32(out + (int64_t)(i0 + j) * out_stride, out_mask, r[j]);
  }
}
#elif defined(__AVX2__)
SG_INLINE void transpose8(__m256i r[8]) {
  __m256i t[8], u[8];
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    t[2 * j] = _mm256_unpacklo_epi32(r[2 * j], r[2 * j + 1]);
    t[2 * j + 1] = _mm256_unpackhi_epi32(r[2 * j], r[2 * j + 1]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; j++) {
    u[4 * j] = _mm256_unpacklo_epi64(t[4 * j], t[4 * j + 2]);
    u[4 * j + 1] = _mm256_unpackhi_epi64(t[4 * j], t[4 * j + 2]);
    u[4 * j + 2] = _mm256_unpacklo_epi64(t[4 * j + 1], t[4 * j + 3]);
    u[4 * j + 3] = _mm256_unpackhi_epi64(t[4 * j + 1], t[4 * j + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    r[j] = _mm256_permute2x128_si256(u[j], u[j + 4], 0x20);
    r[j + 4] = _mm256_permute2x128_si256(u[j], u[j + 4], 0x31);
  }
}
SG_INLINE void transpose16(const uint32_t* const* rows, int n, int len, uint32_t* out,
                           int out_stride, int width) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  for (int r0 = 0; r0 < width; r0 += 8) {
    for (int i0 = 0; i0 < len; i0 += 8) {
      const int part = len - i0 < 8 ? len - i0 : 8;
      const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(part), lane);
      __m256i r[8];
      if (part == 8 && n - r0 >= 8) {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) r[j] = _mm256_loadu_si256((const __m256i*)(rows[r0 + j] + i0));
      } else {
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++)
          r[j] = r0 + j < n ? _mm256_maskload_epi32((const int*)rows[r0 + j] + i0, there)
                            : _mm256_setzero_si256();
      }
      transpose8(r);
      // Whole: a masked store takes ten times as long, and the next one mends it.
      uint32_t* o = out + (int64_t)i0 * out_stride + r0;
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        if (j >= part) break;
        _mm256_storeu_si256((__m256i*)(o + (int64_t)j * out_stride), r[j]);
      }
    }
  }
}
#else
SG_INLINE void transpose16(const uint32_t* const* rows, int n, int len, uint32_t* out,
                           int out_stride, int width) {
  for (int i = 0; i < len; i++) {
    uint32_t* o = out + (int64_t)i * out_stride;
    for (int r = 0; r < n; r++) memcpy(&o[r], rows[r] + i, 4);
    for (int r = n; r < width; r++) o[r] = 0;
  }
}
#endif

}  // namespace SG_ISA
