// Kernels with one deliberate mistake each, to test that the emulator finds it. Two warps; each writes its half of 64
// floats by way of shared memory, where they are reversed.
#pragma once

#include "common/gpu.h"

namespace ard::probes {

enum class Mistake : int {
  kNone,
  kNoBarrier,       // reads what the other warp may not have written
  kNoWait,          // reads what an asynchronous copy may not have brought
  kNeverWaits,      // ends with a copy in flight
  kSkipsBarrier,    // half of the block does not come: deadlock
  kDivergesInWarp,  // lanes of a warp come to different operations
  kOutOfBounds,     // past shared memory, through the checked functions
  kPastEnd,         // past shared memory, behind their back
  kMisaligned,      // 16 bytes from an address that is no multiple of 16
  kBankConflicts,   // no mistake for the values: 32 lanes in one bank
};

struct Params {
  const float* from;
  float* to;
  Mistake mistake;
};

ARD_KERNEL(64, 1) reverse(const ARD_GRID_CONSTANT Params p) {
  const int thread = thread_index();
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const bool conflicts = p.mistake == Mistake::kBankConflicts;
  const auto place = [&](int i) { return conflicts ? i % 32 * 32 + i / 32 : i; };
  if (p.mistake == Mistake::kMisaligned) load_global(p.from + 1);
  cp_async_4(shared + place(thread), p.from + thread, true);
  cp_async_commit();
  if (p.mistake != Mistake::kNoWait && p.mistake != Mistake::kNeverWaits) cp_async_wait<0>();
  if (p.mistake == Mistake::kSkipsBarrier && thread >= 32) return;
  if (p.mistake != Mistake::kNoBarrier) sync_block();
  if (p.mistake == Mistake::kDivergesInWarp) thread % 2 ? sync_warp() : static_cast<void>(shuffle_xor(0, 1));
  if (p.mistake == Mistake::kOutOfBounds) load_shared(shared + 1024);
  if (p.mistake == Mistake::kPastEnd) shared[1024 + thread] = 0;
  p.to[thread] = load_shared(shared + place(63 - thread));
  if (p.mistake == Mistake::kNoWait) cp_async_wait<0>();
}

}  // namespace ard::probes
