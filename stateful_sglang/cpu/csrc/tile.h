// The one matrix product: a tile of up to kTileRows rows times a panel of 32 columns.
//
//   A: words of rows, element (r, k) at a[r * RS + k * KS]
//   B: panel [inner words][32], one word a column: bf16 pairs or floats
//   C: float [rows][ldc]
//
// Every element is accumulated over k in order, one word at a time, whatever the tile's rows, the
// batch or the threads: a token's result does not depend on what it was computed beside.
#pragma once
#include "simd.h"

namespace SG_ISA {

constexpr int kPanel = 32;
#if SG_LANES == 16
constexpr int kTileRows = 12;  // 24 accumulators, 2 panel vectors, 32 registers
#else
constexpr int kTileRows = 4;
#endif
constexpr int kTileVecs = 2;
#ifndef SG_AHEAD
#define SG_AHEAD 32
#endif
constexpr int kAhead = SG_AHEAD;  // words ahead that a streamed panel is prefetched

template <class T, int MR, int RS, int KS, bool kStream>
SG_INLINE void tile_mr(const uint32_t* a, const uint32_t* b, int inner, float* c, int ldc) {
  for (int v0 = 0; v0 < kPanel / kLanes; v0 += kTileVecs) {
    vf acc[MR][kTileVecs];
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; v++) acc[r][v] = vf{};
    const uint32_t* bp = b + v0 * kLanes;
    const uint32_t* ap = a;
#pragma GCC unroll 4
    for (int k = 0; k < inner; k++) {
      if (kStream) {
        __builtin_prefetch(bp + kAhead * kPanel, 0, 3);
        __builtin_prefetch(bp + kAhead * kPanel + 16, 0, 3);
      }
      vu bv[kTileVecs];
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; v++) bv[v] = load_bits(bp + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++) {
        vu av = splat_bits(ap[r * RS]);
#pragma GCC unroll 2
        for (int v = 0; v < kTileVecs; v++) acc[r][v] = dot<T>(acc[r][v], av, bv[v]);
      }
      bp += kPanel;
      ap += KS;
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
      for (int v = 0; v < kTileVecs; v++)
        store(c + (int64_t)r * ldc + (v0 + v) * kLanes, acc[r][v]);
  }
}

// A packed by pack_rows: [inner][rows].
template <class T, bool kStream>
static void tile_packed(int rows, const uint32_t* a, const uint32_t* b, int inner, float* c,
                        int ldc) {
  switch (rows) {
#define SG_CASE(R) \
  case R:          \
    return tile_mr<T, R, 1, R, kStream>(a, b, inner, c, ldc);
    SG_CASE(1)
    SG_CASE(2) SG_CASE(3) SG_CASE(4)
#if SG_LANES == 16
        SG_CASE(5) SG_CASE(6) SG_CASE(7) SG_CASE(8) SG_CASE(9) SG_CASE(10) SG_CASE(11) SG_CASE(12)
#endif
#undef SG_CASE
  }
}

// A row-major with a fixed row stride.
template <class T, int RS>
static void tile_rows(int rows, const uint32_t* a, const uint32_t* b, int inner, float* c,
                      int ldc) {
  switch (rows) {
#define SG_CASE(R) \
  case R:          \
    return tile_mr<T, R, RS, 1, false>(a, b, inner, c, ldc);
    SG_CASE(1)
    SG_CASE(2) SG_CASE(3) SG_CASE(4)
#if SG_LANES == 16
        SG_CASE(5) SG_CASE(6) SG_CASE(7) SG_CASE(8) SG_CASE(9) SG_CASE(10) SG_CASE(11) SG_CASE(12)
#endif
#undef SG_CASE
  }
}

// rows[0..n) of `inner` words each, as [inner][n] (n <= kTileRows).
SG_INLINE void pack_rows(const uint32_t* const* rows, int n, int inner, uint32_t* out) {
  transpose16(rows, n, inner, out, n, n);
}

// rows[0..n) as one panel [inner][32], missing columns zero.
SG_INLINE void pack_panel(const uint32_t* const* rows, int n, int inner, uint32_t* out) {
  transpose16(rows, n < 16 ? n : 16, inner, out, kPanel, 16);
  transpose16(rows + 16, n > 16 ? n - 16 : 0, inner, out + 16, kPanel, 16);
}

}  // namespace SG_ISA
