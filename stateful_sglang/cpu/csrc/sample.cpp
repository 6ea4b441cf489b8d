// Draws tokens from filtered probabilities without sorting the vocabulary.
//
// A histogram over the leading bits of the floats (which order positive floats) finds where top-k
// or top-p ends up to one bucket; only that bucket is sorted. The law is that of sorting
// everything: a token stays while fewer than k are likelier and their mass is at most p.
#include <string.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "abi.h"

namespace {

constexpr int kShift = 19;  // 8 bits of exponent and 4 of mantissa
constexpr int kBuckets = 1 << (31 - kShift);

uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

// Uniform in [0, 1), a function of the key alone (two rounds of SplitMix64; Steele et al. 2014).
double keyed_uniform(int64_t seed, int64_t position) {
  auto mix = [](uint64_t z) {
    z += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  };
  const uint64_t z = mix(mix(static_cast<uint64_t>(seed)) ^ static_cast<uint64_t>(position));
  return static_cast<double>(z >> 11) * 0x1.0p-53;
}

// The least likely token that stays: those likelier stay, those equal up to its index.
struct Cut {
  float value = 0.0f;
  int64_t index = -1;  // < 0: no cut
};

Cut find_cut(const float* p, int n, int64_t k, double mass) {
  std::vector<int32_t> count(kBuckets);
  std::vector<double> sum(kBuckets);
  for (int i = 0; i < n; i++) {
    if (!(p[i] > 0.0f)) continue;
    const uint32_t b = bits_of(p[i]) >> kShift;
    count[b]++;
    sum[b] += p[i];
  }
  int64_t before = 0;
  double mass_before = 0.0;
  int last = -1;
  for (int b = kBuckets - 1; b >= 0; b--) {
    if (count[b] == 0) continue;
    last = b;
    if (before + count[b] >= k || mass_before + sum[b] > mass) break;
    before += count[b];
    mass_before += sum[b];
  }
  std::vector<std::pair<float, int32_t>> edge;
  for (int i = 0; i < n; i++)
    if (p[i] > 0.0f && static_cast<int>(bits_of(p[i]) >> kShift) == last)
      edge.push_back({-p[i], i});
  std::sort(edge.begin(), edge.end());
  Cut cut;
  for (const auto& [negative, index] : edge) {
    if (before >= k || mass_before > mass) break;
    cut = {-negative, index};
    before++;
    mass_before += -negative;
  }
  return cut;
}

int64_t sample_row(const float* p, int n, int64_t k, double top_p, float min_p, double uniform) {
  float tops[8] = {};
  double sums[8] = {};
  for (int i = 0; i < n; i++) {  // eight chains: one would wait for every addition
    tops[i % 8] = std::max(tops[i % 8], p[i]);
    sums[i % 8] += p[i];
  }
  float top = 0.0f;
  double all = 0.0;
  for (int j = 0; j < 8; j++) {
    top = std::max(top, tops[j]);
    all += sums[j];
  }
  const float least = top * min_p;
  const bool filtered = (k > 0 && k < n) || top_p < 1.0;
  Cut cut;
  if (filtered) cut = find_cut(p, n, k > 0 && k < n ? k : n, top_p * all);
  auto stays = [&](int i) {
    return p[i] > 0.0f && p[i] >= least &&
           (cut.index < 0 || p[i] > cut.value || (p[i] == cut.value && i <= cut.index));
  };
  double total = all;
  if (filtered || min_p > 0.0f) {
    total = 0.0;
    for (int i = 0; i < n; i++)
      if (stays(i)) total += p[i];
  }
  const double target = uniform * total;
  double passed = 0.0;
  int64_t chosen = 0;
  for (int i = 0; i < n; i++) {
    if (!stays(i)) continue;
    chosen = i;
    passed += p[i];
    if (passed > target) break;
  }
  return chosen;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void sg_sample(const SgSample* a) {
#pragma omp parallel for schedule(dynamic) if (a->rows > 1)
  for (int r = 0; r < a->rows; r++) {
    const double u = a->uniform ? a->uniform[r] : keyed_uniform(a->seed[r], a->position[r]);
    a->out[r] = sample_row(a->probs + r * a->row_stride, a->vocab, a->top_k ? a->top_k[r] : 0,
                           a->top_p ? a->top_p[r] : 1.0f, a->min_p ? a->min_p[r] : 0.0f, u);
  }
}
