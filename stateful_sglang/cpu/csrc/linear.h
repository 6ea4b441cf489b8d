// Linear layers over weights packed once, from one row to thousands.
//
// The packed weight is a sequence of panels (tile.h) of 32 output columns, so that a few rows
// stream it from memory once, in order. The input is packed, and where asked normalised, by each
// thread for itself: cheaper than waiting for another.
//
// Where several passes are made over a panel, it is cut along the inner dimension into pieces that
// stay in the first-level cache meanwhile; the sums wait in `c` (Goto and van de Geijn 2008). Where
// the weight comes from memory, each pass fetches its part of the next piece, so that computing and
// reading overlap.
#pragma once
#include "abi.h"
#include "rows.h"
#include "team.h"
#include "tile.h"

namespace SG_ISA {

#ifndef SG_PIECE
#define SG_PIECE 8192
#endif
constexpr int kPieceBytes = SG_PIECE;  // of a panel, held in the first-level cache
#ifndef SG_AHEAD
#define SG_AHEAD 4096
#endif
constexpr int kAheadBytes = SG_AHEAD;  // of a panel that one tile streams, fetched beforehand

template <class W>
constexpr int step_bytes() {
  return kPanel * (int)sizeof(Cell<W>);
}

// Rows kept packed at once: about half of L2, so that a panel passes over many rows.
SG_INLINE int linear_block_rows(int left_size) {
  int rows = 512 * 1024 / (left_size * 4) / kTileRows * kTileRows;
  const int most = 20 * 12;
  return rows < 4 * kTileRows ? 4 * kTileRows : rows > most ? most : rows;
}

// A thread's memory for one product.
template <class W>
struct LinearScratch {
  Left<W>* left;    // the block's rows, packed
  LeftRow<W>* tmp;  // a tile's rows on their way there
  float* c;         // [rows of a block][32] sums of one panel
  int64_t lay(int rows, int inner, char* base) {
    char* at = base;
    auto take = [&](int64_t bytes) {
      char* r = at;
      at += (bytes + 63) / 64 * 64;
      return r;
    };
    const int size = left_size<W>(inner), block = linear_block_rows(size);
    const int kept = rows < block ? rows : block;
    left = (Left<W>*)take(((int64_t)kept * size + kPackSlack) * 4);
    tmp = (LeftRow<W>*)take((int64_t)kTileRows * size * 4);
    c = (float*)take((int64_t)kept * kPanel * 4);
    return at - base;
  }
};

// Rows m0..m1 of x as tiles of `tile` rows [inner][rows], normalised if asked.
template <class T, class W>
static void pack_input(const SgLinear& a, int m0, int m1, int tile, const LinearScratch<W>& sc) {
  typedef LeftRow<W> Row;
  const int size = left_size<W>(a.inner);
  for (int m = m0; m < m1; m += tile) {
    const int n = m1 - m < tile ? m1 - m : tile;
    const Row* src[kTileRows];
    for (int r = 0; r < n; r++) {
      const int64_t at = (int64_t)(m + r) * a.x_row;
      const float* wide = (const float*)a.x + at;
      const T* narrow = (const T*)a.x + at;
      Row* t = sc.tmp + (int64_t)r * size * (4 / sizeof(Row));
      if (a.norm && a.x_f32)
        norm_row(wide, (const float*)a.norm, 0.0f, a.norm_eps, a.inner, t);
      else if (a.norm)
        norm_row(narrow, (const float*)a.norm, 0.0f, a.norm_eps, a.inner, t);
      else if (a.x_f32)
        t = (Row*)convert_row(wide, a.inner, t);
      else
        t = (Row*)convert_row(narrow, a.inner, t);
      src[r] = t;
    }
    pack_left<W>(src, n, a.inner, sc.left + (int64_t)(m - m0) * size);
  }
}

// Columns of a finished tile to where they go. c: [n][32] float.
template <class T>
SG_INLINE void finish_tile(const SgLinear& a, float* c, int n, int m, int panel) {
  const int col = panel * kPanel;
  const int width = a.cols - col < kPanel ? a.cols - col : kPanel;
  for (int r = 0; r < n; r++, c += kPanel) {
    if (a.scale)
      for (int i = 0; i < kPanel; i += kLanes)
        store(c + i, load(c + i) * load((const float*)a.scale + col + i));
    if (a.bias)
      for (int i = 0; i < width; i += kLanes)
        store(c + i, load(c + i) + load_upto((const T*)a.bias + col + i, width - i));
    const int64_t row = (int64_t)(m + r) * a.out_row;
    if (a.epilogue == SG_GATED) {
      const int half = kPanel / 2, to = col / 2;
      for (int i = 0; i < half; i += kLanes) {
        const vf y = activate(load(c + i), a.act) * load(c + half + i);
        if (a.out_f32)
          store((float*)a.out + row + to + i, y);
        else
          store((T*)a.out + row + to + i, y);
      }
    } else if (a.epilogue == SG_ADD) {
      float* o = (float*)a.out + row + col;
      for (int i = 0; i < width; i += kLanes)
        store_upto(o + i, load_upto(o + i, width - i) + load(c + i), width - i);
    } else {
      for (int i = 0; i < width; i += kLanes) {
        if (a.out_f32)
          store_upto((float*)a.out + row + col + i, load(c + i), width - i);
        else
          store_upto((T*)a.out + row + col + i, load(c + i), width - i);
      }
    }
  }
}

template <class T, class W>
static void linear_stage_typed(SgTeam& team, const SgLinear& a) {
  const int size = left_size<W>(a.inner), steps = steps_of<W>(a.inner);
  const int panels = (a.cols + kPanel - 1) / kPanel;
  const int block = linear_block_rows(size);
  const int blocks = (a.rows + block - 1) / block;
  int per = (int)(((int64_t)panels * blocks + 16 * team.size - 1) / (16 * team.size));
  per = per > panels ? panels : per;
  const int groups = per ? (panels + per - 1) / per : 0;

  LinearScratch<W> sc;
  sc.lay(a.rows, a.inner, team.scratch);
  int have = -1;
  team.share((int64_t)groups * blocks, [&](int64_t i) {
    const int b = (int)(i / groups), g = (int)(i % groups);
    const int m0 = b * block, m1 = m0 + block < a.rows ? m0 + block : a.rows;
    const int tile = even_tile(m1 - m0), tiles = (m1 - m0 + tile - 1) / tile;
    if (have != b) pack_input<T, W>(a, m0, m1, tile, sc);
    have = b;
    const int passes = tiles * tile_passes(tile);
    const int piece = passes > 1 ? kPieceBytes / step_bytes<W>() : steps;
    const int last = (g + 1) * per < panels ? (g + 1) * per : panels;
    for (int p = g * per; p < last; p++) {
      const Cell<W>* weight = (const Cell<W>*)a.weight + (int64_t)p * steps * kPanel;
      for (int k = 0; k < steps; k += piece) {
        const int n_steps = steps - k < piece ? steps - k : piece;
        const Cell<W>* w = weight + (int64_t)k * kPanel;
        // All passes together fetch as much as they use.
        const int step = step_bytes<W>() / passes;
        const char* ahead = (const char*)w + (passes > 1 ? n_steps * step_bytes<W>() : kAheadBytes);
        for (int t = 0; t < tiles; t++) {
          const int m = m0 + t * tile, n = m1 - m < tile ? m1 - m : tile;
          const Left<W>* x =
              sc.left + (int64_t)(m - m0) * size + (int64_t)k * n * LeftStep<W>::size;
          tile_packed<W>(n, x, w, n_steps, sc.c + (int64_t)(m - m0) * kPanel, kPanel, k > 0,
                         {step >= kLeastAhead ? ahead : nullptr, step});
          ahead += (int64_t)n_steps * tile_passes(n) * step;
        }
      }
      finish_tile<T>(a, sc.c, m1 - m0, m0, p);
    }
  });
}

template <class T>
static void linear_stage(SgTeam& team, const SgLinear& a) {
  if (a.scale)
    linear_stage_typed<T, int8_t>(team, a);
  else
    linear_stage_typed<T, T>(team, a);
}

template <class T>
static int64_t linear_scratch(int rows, int inner, bool int8) {
  LinearScratch<T> same;
  LinearScratch<int8_t> bytes;
  return int8 ? bytes.lay(rows, inner, nullptr) : same.lay(rows, inner, nullptr);
}

// The weight's column that is number j of panel p. Interleaved: the two halves of cols alternate by
// 16 columns, so that a panel holds a gate and the matching up columns (cols % 32 == 0).
SG_INLINE int64_t packed_column(int64_t p, int j, int cols, bool interleave) {
  if (!interleave) return p * kPanel + j;
  return p * (kPanel / 2) + j % (kPanel / 2) + (j >= kPanel / 2 ? cols / 2 : 0);
}

// Weight [cols, inner] to panels.
template <class T>
static void pack_stage(SgTeam& team, const T* weight, int64_t row_stride, int cols, int inner,
                       bool interleave, uint32_t* out) {
  const int w = words<T>(inner), panels = (cols + kPanel - 1) / kPanel;
  team.share(panels, [&](int64_t p) {
    const uint32_t* src[kPanel];
    int n = 0;
    for (int j = 0; j < kPanel && p * kPanel + j < cols; j++, n++) {
      src[j] = (const uint32_t*)(weight + packed_column(p, j, cols, interleave) * row_stride);
    }
    for (int j = n; j < kPanel; j++) src[j] = src[0];
    pack_panel(src, n, w, out + p * w * kPanel);
  });
}

// Likewise as int8 with one scale a column, symmetric: its largest magnitude becomes 127. scale:
// [panels * 32], zero where there is no column.
template <class T>
static void pack_int8_stage(SgTeam& team, const T* weight, int64_t row_stride, int cols, int inner,
                            bool interleave, int8_t* out, float* scale) {
  team.share((cols + kPanel - 1) / kPanel, [&](int64_t p) {
    int8_t* panel = out + p * inner * kPanel;
    for (int j = 0; j < kPanel; j++) {
      const bool there = p * kPanel + j < cols;
      const T* w = weight + (there ? packed_column(p, j, cols, interleave) : 0) * row_stride;
      float most = 0.0f;
      for (int k = 0; there && k < inner; k++) {
        const float x = get(w + k), size = x < 0.0f ? -x : x;
        most = size > most ? size : most;
      }
      scale[p * kPanel + j] = most / 127.0f;
      const float inverse = most > 0.0f ? 127.0f / most : 0.0f;
      for (int k = 0; k < inner; k++)
        panel[(int64_t)k * kPanel + j] = there ? (int8_t)__builtin_rintf(get(w + k) * inverse) : 0;
    }
  });
}

}  // namespace SG_ISA
