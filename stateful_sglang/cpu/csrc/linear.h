// Linear layers over weights packed once, from one row to thousands.
//
// The packed weight is a sequence of panels (tile.h) of 32 output columns, so that a few rows
// stream it from memory once, in order. The input is packed, and where asked normalised, by each
// thread for itself: cheaper than waiting for another.
#pragma once
#include "abi.h"
#include "rows.h"
#include "team.h"
#include "tile.h"

namespace SG_ISA {

// Rows kept packed at once: about half of L2, so that a panel passes over many rows.
SG_INLINE int linear_block_rows(int words_inner) {
  int rows = 512 * 1024 / (words_inner * 4) / kTileRows * kTileRows;
  const int most = 20 * 12;
  return rows < 4 * kTileRows ? 4 * kTileRows : rows > most ? most : rows;
}

template <class T>
SG_INLINE int64_t linear_scratch(int rows, int inner) {
  const int w = words<T>(inner);
  int block = linear_block_rows(w);
  if (rows < block) block = rows;
  return ((int64_t)block * w + kTileRows * w + kTileRows * kPanel) * 4 + 192;
}

// Rows m0..m1 of x as tiles of [inner][rows], normalised if asked.
template <class T>
static void pack_input(const SgLinear& a, int m0, int m1, int w, uint32_t* out, uint32_t* tmp) {
  for (int m = m0; m < m1; m += kTileRows) {
    const int n = m1 - m < kTileRows ? m1 - m : kTileRows;
    const uint32_t* src[16];
    for (int r = 0; r < n; r++) {
      const int64_t row = (int64_t)(m + r) * a.x_row;
      T* t = (T*)(tmp + (int64_t)r * w);
      if (a.norm && a.x_f32)
        norm_row((const float*)a.x + row, (const float*)a.norm, 0.0f, a.norm_eps, a.inner, t);
      else if (a.norm)
        norm_row((const T*)a.x + row, (const float*)a.norm, 0.0f, a.norm_eps, a.inner, t);
      else if (a.x_f32 && sizeof(T) != 4)
        for (int i = 0; i < a.inner; i += kLanes)
          store_upto(t + i, load_upto((const float*)a.x + row + i, a.inner - i), a.inner - i);
      else
        t = (T*)a.x + row;
      src[r] = (const uint32_t*)t;
    }
    if (n == 1)
      memcpy(out + (int64_t)(m - m0) * w, src[0], (int64_t)w * 4);
    else
      pack_rows(src, n, w, out + (int64_t)(m - m0) * w);
  }
}

// Columns of a finished tile to where they go. c: [n][32] float.
template <class T>
SG_INLINE void finish_tile(const SgLinear& a, float* c, int n, int m, int panel) {
  const int col = panel * kPanel;
  const int width = a.cols - col < kPanel ? a.cols - col : kPanel;
  for (int r = 0; r < n; r++, c += kPanel) {
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

template <class T>
static void linear_stage(SgTeam& team, const SgLinear& a) {
  const int w = words<T>(a.inner), panels = (a.cols + kPanel - 1) / kPanel;
  const int block = linear_block_rows(w);
  const int blocks = (a.rows + block - 1) / block;
  int per = (int)(((int64_t)panels * blocks + 16 * team.size - 1) / (16 * team.size));
  per = per > panels ? panels : per;
  const int groups = per ? (panels + per - 1) / per : 0;

  const int kept = a.rows < block ? a.rows : block;
  uint32_t* packed = (uint32_t*)team.scratch;
  uint32_t* tmp = packed + ((int64_t)kept * w + 15) / 16 * 16;
  float* c = (float*)(tmp + ((int64_t)kTileRows * w + 15) / 16 * 16);

  int have = -1;
  team.share((int64_t)groups * blocks, [&](int64_t i) {
    const int b = (int)(i / groups), g = (int)(i % groups);
    const int m0 = b * block, m1 = m0 + block < a.rows ? m0 + block : a.rows;
    if (have != b) pack_input<T>(a, m0, m1, w, packed, tmp);
    have = b;
    const int last = (g + 1) * per < panels ? (g + 1) * per : panels;
    for (int p = g * per; p < last; p++) {
      const uint32_t* weight = (const uint32_t*)a.weight + (int64_t)p * w * kPanel;
      for (int m = m0; m < m1; m += kTileRows) {
        const int n = m1 - m < kTileRows ? m1 - m : kTileRows;
        const uint32_t* x = packed + (int64_t)(m - m0) * w;
        if (m == m0)
          tile_packed<T, true>(n, x, weight, w, c, kPanel);
        else
          tile_packed<T, false>(n, x, weight, w, c, kPanel);
        finish_tile<T>(a, c, n, m, p);
      }
    }
  });
}

// Weight [cols, inner] to panels. Interleaved: the two halves of cols alternate by 16 columns, so
// that a panel holds a gate and the matching up columns (cols % 32 == 0).
template <class T>
static void pack_stage(SgTeam& team, const T* weight, int64_t row_stride, int cols, int inner,
                       bool interleave, uint32_t* out) {
  const int w = words<T>(inner), panels = (cols + kPanel - 1) / kPanel;
  team.share(panels, [&](int64_t p) {
    const uint32_t* src[kPanel];
    int n = 0;
    for (int j = 0; j < kPanel && p * kPanel + j < cols; j++, n++) {
      int64_t col = p * kPanel + j;
      if (interleave) col = p * (kPanel / 2) + j % (kPanel / 2) + (j >= kPanel / 2 ? cols / 2 : 0);
      src[j] = (const uint32_t*)(weight + col * row_stride);
    }
    for (int j = n; j < kPanel; j++) src[j] = src[0];
    pack_panel(src, n, w, out + p * w * kPanel);
  });
}

}  // namespace SG_ISA
