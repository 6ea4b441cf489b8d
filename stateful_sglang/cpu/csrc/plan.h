// How one attention call is cut into work items; the same for every layer of a forward pass.
#pragma once
#include <stdint.h>

#include "abi.h"

constexpr int kAttnKeys = 128;  // keys of one block

// Queries q0..q1 of a request under KV heads head0..head1, against key blocks block0..block1. Few
// queries take several heads, so that a token's keys are read from memory in one run.
struct SgAttnItem {
  int32_t request, head0, head1, q0, q1, block0, block1;
  int64_t partial;  // first float of this item's partials, [blocks, heads, rows, dpad + 2]; < 0: it
                    // sees all blocks and finishes
  int heads() const { return head1 - head0; }
  int blocks() const { return block1 - block0; }
};

struct SgAttnPlan {
  SgAttnItem* items;
  int64_t n_items;
  SgAttnItem* merges;  // items whose partials have to be put together
  int32_t n_merges;
  float* partials;
};

// Rows of an item: enough to make packing a key block cheap, few enough to stay in L2.
static inline int plan_block_queries(int group) { return group >= 96 ? 1 : 96 / group; }
static inline int plan_block_rows(int group) { return plan_block_queries(group) * group; }
