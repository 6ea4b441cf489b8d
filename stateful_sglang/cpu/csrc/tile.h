// The one matrix product: a tile of up to kTileRows rows times a panel of 32 columns.
//
//   A: the left operand, element (r, k) at a[r * RS + k * KS]
//   B: a panel of steps; a step is 32 cells, one a column: a float, a pair of bf16, or an int8
//   C: float [rows][ldc]
//
// Where the processor multiplies pairs of bf16, A holds such pairs; anywhere else, and beside int8,
// A holds floats and B is widened on its way through the registers.
//
// Every element is accumulated over k in order, one step at a time, whatever the tile's rows, the
// batch or the threads: a token's result does not depend on what it was computed beside.
#pragma once
#include "simd.h"

namespace SG_ISA {

constexpr int kPanel = 32;
#if SG_LANES == 16
constexpr int kTileRows = 12;  // 24 accumulators, 2 panel vectors, 32 registers
#elif SG_LANES == 8
constexpr int kTileRows = 6;  // 12 accumulators, 2 panel vectors, 16 registers
#else
constexpr int kTileRows = 4;
#endif

// Vectors of columns that a tile of mr rows passes over at once: enough sums in flight to hide a
// multiplication's latency, no more than there are registers.
constexpr int tile_vecs(int mr) {
#if SG_LANES == 8
  return mr <= 3 ? 4 : 2;
#else
  return mr > 0 ? 2 : 0;
#endif
}

// Passes over a panel that a tile of mr rows takes.
SG_INLINE int tile_passes(int mr) { return kPanel / kLanes / tile_vecs(mr); }

template <class W>
struct Cells {  // float
  typedef uint32_t Cell;
  static constexpr int per = 1;  // elements of the inner dimension in a step
  template <int H>
  static SG_INLINE_MEMBER vf widened(const Cell* p) {
    return (vf)load_bits(p);
  }
};
template <>
struct Cells<bf16> {
  typedef uint32_t Cell;
  static constexpr int per = 2;
  template <int H>
  static SG_INLINE_MEMBER vf widened(const Cell* p) {
    vu pair = load_bits(p);
    if (H == 0) return (vf)(pair << 16);
#if defined(__AVX2__) && SG_LANES == 8
    // As two shifts, which the compiler would make one mask again: no register is left to hold it.
    __asm__("vpsrld $16, %0, %0\n\tvpslld $16, %0, %0" : "+x"(pair));
    return (vf)pair;
#else
    return (vf)(pair & 0xffff0000u);
#endif
  }
};
template <>
struct Cells<int8_t> {
  typedef int8_t Cell;
  static constexpr int per = 1;
  template <int H>
  static SG_INLINE_MEMBER vf widened(const Cell* p) {
    return load(p);
  }
};
template <class W>
using Cell = typename Cells<W>::Cell;

// Whether A holds pairs beside this B.
template <class W>
struct Pairs {
  static constexpr bool yes = false;
};
template <bool pairs>
struct LeftOf {
  typedef float Element, Row;
};
template <>
struct LeftOf<true> {
  typedef uint32_t Element;
  typedef bf16 Row;
};
#if defined(__AVX512BF16__)
template <>
struct Pairs<bf16> {
  static constexpr bool yes = true;
};
#endif
// What A is made of, and what a row of it is before it is packed.
template <class W>
using Left = typename LeftOf<Pairs<W>::yes>::Element;
template <class W>
using LeftRow = typename LeftOf<Pairs<W>::yes>::Row;
// Elements of A in one step, and in an inner dimension.
template <class W>
struct LeftStep {
  static constexpr int size = Pairs<W>::yes ? 1 : Cells<W>::per;
};
template <class W>
SG_INLINE int steps_of(int inner) {
  return (inner + Cells<W>::per - 1) / Cells<W>::per;
}
template <class W>
SG_INLINE int left_size(int inner) {
  return steps_of<W>(inner) * LeftStep<W>::size;
}

// Memory to fetch while a tile is computed: `step` bytes further at each of its steps. Below
// kLeastAhead bytes a step it is not worth the instruction: the weight is used too often.
constexpr int kLeastAhead = 8;
struct Ahead {
  const char* at;
  int step;
};

// acc[r][v] += left[r] * right[v], right given as a function of v. What there is less of is held in
// registers meanwhile.
template <int MR, int NV, class L, class R>
SG_INLINE void outer_product(vf (&acc)[MR][NV], L left, R right) {
  if constexpr (MR < NV) {
    vf a[MR];
#pragma GCC unroll 4
    for (int r = 0; r < MR; r++) a[r] = splat(left(r));
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) {
      const vf b = right(v);
#pragma GCC unroll 4
      for (int r = 0; r < MR; r++) acc[r][v] += a[r] * b;
    }
  } else {
    vf b[NV];
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) b[v] = right(v);
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++) {
      const vf a = splat(left(r));
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) acc[r][v] += a * b[v];
    }
  }
}

// One element of the inner dimension, the first or second of its step, of MR rows.
template <class W, int H, int MR, int NV, int RS>
SG_INLINE void half_step(vf (&acc)[MR][NV], const Left<W>* a, const Cell<W>* b) {
  outer_product<MR, NV>(
      acc, [&](int r) __attribute__((always_inline)) { return (float)a[r * RS]; },
      [&](int v)
          __attribute__((always_inline)) { return Cells<W>::template widened<H>(b + v * kLanes); });
}

// MR rows times NV vectors of columns from b on; with `more`, added to what c holds.
template <class W, int MR, int NV, int RS, int KS>
SG_INLINE void tile_columns(const Left<W>* a, const Cell<W>* b, int steps, float* c, int ldc,
                            bool more, Ahead ahead) {
  vf acc[MR][NV];
#pragma GCC unroll 12
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) acc[r][v] = more ? load(c + (int64_t)r * ldc + v * kLanes) : vf{};
#pragma GCC unroll 2
  for (int k = 0; k < steps; k++) {
    if (ahead.at) {
      __builtin_prefetch(ahead.at, 0, 3);
      if (NV * kLanes == kPanel && sizeof(Cell<W>) == 4) __builtin_prefetch(ahead.at + 64, 0, 3);
      ahead.at += ahead.step;
    }
#if defined(__AVX512BF16__)
    if constexpr (Pairs<W>::yes) {
      vu bv[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) bv[v] = load_bits(b + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < MR; r++) {
        const __m512bh av = (__m512bh)splat_bits(a[r * RS]);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++)
          acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], av, (__m512bh)bv[v]);
      }
    } else
#endif
    {
      half_step<W, 0, MR, NV, RS>(acc, a, b);
      if constexpr (Cells<W>::per == 2) {
        __asm__ __volatile__("" ::: "memory");  // Load B again: no register is left to keep it in.
        half_step<W, 1, MR, NV, RS>(acc, a + KS, b);
      }
    }
    b += kPanel;
    a += LeftStep<W>::size * KS;
  }
#pragma GCC unroll 12
  for (int r = 0; r < MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(c + (int64_t)r * ldc + v * kLanes, acc[r][v]);
}

// The panel's columns in one pass or several, which share the memory to fetch.
template <class W, int MR, int RS, int KS>
SG_INLINE void tile_mr(const Left<W>* a, const Cell<W>* b, int steps, float* c, int ldc, bool more,
                       Ahead ahead) {
  constexpr int kVecs = tile_vecs(MR), kPasses = kPanel / kLanes / kVecs;
#pragma GCC unroll 1
  for (int pass = 0; pass < kPasses; pass++) {
    const int column = pass * kVecs * kLanes;
    tile_columns<W, MR, kVecs, RS, KS>(a, b + column, steps, c + column, ldc, more, ahead);
    ahead.at = ahead.at ? ahead.at + (int64_t)steps * ahead.step : nullptr;
  }
}

#if SG_LANES == 16
#define SG_EACH_TILE(CASE) \
  CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#elif SG_LANES == 8
#define SG_EACH_TILE(CASE) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#else
#define SG_EACH_TILE(CASE) CASE(1) CASE(2) CASE(3) CASE(4)
#endif

// A packed by pack_left: [inner][rows]. `ahead` as for one pass over the whole panel.
template <class W>
static void tile_packed(int rows, const Left<W>* a, const Cell<W>* b, int steps, float* c, int ldc,
                        bool more = false, Ahead ahead = {nullptr, 0}) {
  switch (rows) {
#define SG_CASE(R) \
  case R:          \
    return tile_mr<W, R, 1, R>(a, b, steps, c, ldc, more, ahead);
    SG_EACH_TILE(SG_CASE)
#undef SG_CASE
  }
}

// A row-major with a fixed row stride.
template <class W, int RS>
static void tile_rows(int rows, const Left<W>* a, const Cell<W>* b, int steps, float* c, int ldc) {
  switch (rows) {
#define SG_CASE(R) \
  case R:          \
    return tile_mr<W, R, RS, 1>(a, b, steps, c, ldc, false, {nullptr, 0});
    SG_EACH_TILE(SG_CASE)
#undef SG_CASE
  }
}

// Rows of a tile when `n` are computed in as few tiles as may be, alike in size.
SG_INLINE int even_tile(int n) {
  const int tiles = (n + kTileRows - 1) / kTileRows;
  return tiles ? (n + tiles - 1) / tiles : 1;
}

// rows[0..n) of `inner` elements each as the left operand, [left_size][n] (n <= kTileRows). Up to
// kPackSlack elements behind it are written too.
constexpr int kPackSlack = 16;
template <class W>
SG_INLINE void pack_left(const LeftRow<W>* const* rows, int n, int inner, Left<W>* out) {
  if (n == 1)
    memcpy(out, rows[0], (int64_t)inner * sizeof(LeftRow<W>));
  else
    transpose16((const uint32_t* const*)rows, n, left_size<W>(inner), (uint32_t*)out, n, n);
}

// rows[0..n) as one panel [inner][32], missing columns zero.
SG_INLINE void pack_panel(const uint32_t* const* rows, int n, int inner, uint32_t* out) {
  transpose16(rows, n < 16 ? n : 16, inner, out, kPanel, 16);
  transpose16(rows + 16, n > 16 ? n - 16 : 0, inner, out + 16, kPanel, 16);
}

}  // namespace SG_ISA
