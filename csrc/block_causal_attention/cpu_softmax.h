// The softmax of attention on the CPU, down the rows of scores whose queries lie along the lanes.
#pragma once

#include "cpu_rows.h"

namespace ard {
namespace {

const float kInfinity = __builtin_inff();

// Running softmax of the lanes: scores (count, lanes) become weights relative to e^base. In units of log 2 weights
// would cost as much, but lse and base would be rounded on their way to the other unit: of scores of 1000 that is 2e-5
// of dv.
struct Softmax {
  // A base grows when weights would pass e^kSlack, so earlier ones are rarely worked on again.
  static constexpr float kSlack = 5.5f;
  float base[kRows], sum[kRows], fade[kRows];  // fade: what earlier weights are to be multiplied by

  // Returns whether any fade is not 1; of the first scores, which have no earlier weights, false.
  bool take(float* scores, int64_t count, int64_t lanes, bool first) {
    Ints fades{};
    for (int64_t c = 0; c < lanes; c += kLanes) {
      float* own = scores + c;
      const Lanes before = first ? Lanes{} - kInfinity : load_lanes(base + c);
      const Lanes top = largest(own, count, lanes);
      const Lanes after = top > before + kSlack ? top : before;
      const Lanes from = after == -kInfinity ? Lanes{} : after;
      Lanes total{};
      for (int64_t j = 0; j < count; ++j, own += lanes) {
        const Lanes weight = exp_lanes(load_lanes(own) - from);
        store_lanes(own, weight);
        total += weight;
      }
      store_lanes(base + c, after);
      if (!first) {
        const Lanes faded = exp_lanes(before - from);
        store_lanes(fade + c, faded);
        total += load_lanes(sum + c) * faded;
        fades |= faded != 1.0f;
      }
      store_lanes(sum + c, total);
    }
    return any(fades);
  }

  // The largest of each lane, in four chains that hide the latency of a comparison.
  static ARD_INLINE Lanes largest(const float* scores, int64_t count, int64_t lanes) {
    Lanes chains[4];
    for (Lanes& chain : chains) chain = Lanes{} - kInfinity;
    int64_t j = 0;
    for (; j + 4 <= count; j += 4, scores += 4 * lanes)
      for (int i = 0; i < 4; ++i) chains[i] = at_least(chains[i], load_lanes(scores + i * lanes));
    for (; j < count; ++j, scores += lanes) chains[0] = at_least(chains[0], load_lanes(scores));
    return at_least(at_least(chains[0], chains[1]), at_least(chains[2], chains[3]));
  }
};

}  // namespace
}  // namespace ard
