// What the roles of the Hopper kernel share: parameters, shared memory, rings.
#pragma once

#include "../common/hopper.h"
#include "sm90_entry.h"

namespace ard::sm90 {

struct Params {
  TensorMap q[2], k[2], v[2];  // one per column group
  AttentionParams attention;
  int64_t programs;
};

template <int kHeadDim_>
struct Traits {
  static constexpr int kHeadDim = kHeadDim_, kConsumers = 2, kThreads = 128 * (1 + kConsumers);
  static constexpr int kStages = stages(kHeadDim);
  static constexpr TileLayout kQ = score_layout(kHeadDim, kBlockM), kK = score_layout(kHeadDim, kBlockN),
                              kV = value_layout(kHeadDim, kBlockN);
  // setmaxnreg: 128 * 24 + 256 * 240 of 65536 registers
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kOffsetK = kQueryStages * kQ.bytes(), kOffsetV = kOffsetK + kStages * kK.bytes();
  static constexpr int kOffsetBarriers = kOffsetV + kStages * kV.bytes(),
                       kSharedBytes = kOffsetBarriers + kBarrierBytes;
  static_assert(kStages >= 2 && kSharedBytes <= kSharedBytesLimit);
};

// What the producer tells the consumers of an item, next to its queries: the TileItem, then batch, head, both, 0.
struct Message {
  Words words[3];
};

struct Barriers {
  uint64_t full_q[kQueryStages], empty_q[kQueryStages];
  uint64_t full_k[4], empty_k[4], full_v[4], empty_v[4];
  uint32_t bounds_at[4];  // MaskedTile::at of the key tile in a stage of K
  Message message[kQueryStages];
};
static_assert(sizeof(Barriers) <= kBarrierBytes);

// Position in a ring: the stage, and the parity of the phase in which it is full.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;

  ARD_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Named barriers; 0 is sync_block's. A consumer's turn to issue, and a meeting of its own warps.
constexpr int kTurn = 1, kOwn = 3;

ARD_DEVICE int as_int(uint32_t word) { return static_cast<int>(word); }
ARD_DEVICE uint32_t as_word(int value) { return static_cast<uint32_t>(value); }

ARD_DEVICE TileItem item_of(const Words& a, const Words& b) {
  return {as_int(a.word[0]), as_int(a.word[1]), as_int(a.word[2]), as_int(a.word[3]),
          as_int(b.word[0]), as_int(b.word[1]), as_int(b.word[2]), as_int(b.word[3])};
}

}  // namespace ard::sm90
