// Attention over segments on the CPU: cuts the work into units, always the same for a shape, picks the ISA, runs units
// in parallel. Results are bit-equal for any number of threads.
#include <algorithm>

#include "../common/isa.h"
#include "../common/scratch.h"
#include "../common/subnormals.h"
#include "cpu_kernels.h"

namespace ard {

namespace {

const AttentionKernels& kernels_in_use() {
#if defined(ARD_X86)
  return for_isa<AttentionKernels>({&attention_kernels_avx512, &attention_kernels_avx2, &attention_kernels_baseline});
#else
  return attention_kernels_baseline;
#endif
}

// Units that are enough for the cores there may be. Where there are fewer key heads, their queries are cut: a forward's
// unit may bring the keys together once more (so it has rows enough for that), a backward's has sums of its own.
constexpr int64_t kForwardUnits = 32, kForwardRows = 512, kBackwardUnits = 12;
// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kParallelWork = 1 << 18;
// Units that follow each other share lines of memory, which two cores pass to and fro: with one unit at a time tiny
// ones took 1.7 times as long. So a thread takes some in a row: all of its share where that is little work, else so few
// that a core with other work does not hold up the rest.
constexpr int64_t kLittleWork = 1 << 22, kTurns = 16;
// Scratch that a thread keeps for its next call: fresh memory costs a page fault every 4 KiB.
constexpr int64_t kKeptFloats = 4 << 20;

int64_t cuts_for(const AttentionCall& p, const AttentionTiles& tiles, int64_t units, int64_t rows) {
  const int64_t heads = p.batch * p.kv_heads, wanted = (units + heads - 1) / heads;
  const int64_t most = p.rows * p.group() / rows, count = static_cast<int64_t>(tiles.tiles.size());
  return std::max<int64_t>(1, std::min({wanted, most, count}));
}

// Multiply-adds of each product of a forward.
int64_t work_of(const AttentionCall& p, const AttentionTiles& tiles) {
  int64_t pairs = 0;
  for (const AttentionTiles::Tile& tile : tiles.tiles)
    for (int64_t i = tile.first_piece; i < tile.stop_piece; ++i)
      pairs += int64_t{tile.stop - tile.start} * (tiles.pieces[i].stop - tiles.pieces[i].start);
  return p.batch * p.heads * p.head_dim * pairs;
}

// nullptr where there is no memory: no exception may leave a parallel region.
class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    static thread_local std::unique_ptr<float[], AlignedDelete> kept;
    static thread_local int64_t kept_floats = 0;
    try {
      if (floats <= kKeptFloats) {
        if (floats > kept_floats) kept = make_scratch(floats), kept_floats = floats;
        data_ = kept.get();
      } else {
        own_ = make_scratch(floats);
        data_ = own_.get();
      }
    } catch (const std::bad_alloc&) {
    }
  }
  float* get() const { return data_; }

 private:
  std::unique_ptr<float[], AlignedDelete> own_;
  float* data_ = nullptr;
};

// Calls run(unit, number, scratch) for `cuts` units of each key head, and returns whether all returned true.
template <class Run>
bool for_units(const AttentionCall& p, const AttentionTiles& tiles, int64_t cuts, int64_t scratch_floats, Run run) {
  const int64_t count = static_cast<int64_t>(tiles.tiles.size()), heads = p.batch * p.kv_heads, units = heads * cuts;
  const int64_t work = work_of(p, tiles);
  const int threads = work < kParallelWork ? 1 : p.threads;
  const bool little = work < threads * kLittleWork;
  const int64_t turns = threads * (little ? 1 : kTurns), chunk = (units + turns - 1) / turns;
  bool good = true, room = true;
#pragma omp parallel num_threads(threads) reduction(&& : good, room)
  {
    const Scratch scratch(scratch_floats);
    // Weights of peaked softmaxes, times small gradients: with them a backward took 4 times as long.
    [[maybe_unused]] const SubnormalsAreZero flush;
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < units; ++i) {
      room = room && scratch.get();
      if (!room) continue;
      // Last cuts first: of a causal mask they are the most work, and one at the end would run alone.
      const int64_t head = little ? i / cuts : i % heads, cut = little ? i % cuts : cuts - 1 - i / heads;
      const AttentionUnit unit{head / p.kv_heads, head % p.kv_heads, count * cut / cuts, count * (cut + 1) / cuts};
      good = run(unit, head * cuts + cut, scratch.get()) && good;
    }
  }
  if (!room) throw std::bad_alloc();
  return good;
}

}  // namespace

bool attention_forward_cpu(const AttentionCall& p, const AttentionTiles& tiles, const PrepareHead& prepare) {
  const AttentionKernels& kernels = kernels_in_use();
  const int64_t cuts = cuts_for(p, tiles, kForwardUnits, kForwardRows), floats = kernels.scratch_floats(p, false);
  const bool shared = cuts > 1;  // several units read the same head
  if (prepare && shared) {
    for_units(p, tiles, 1, floats, [&](const AttentionUnit& unit, int64_t, float*) {
      prepare(unit.batch, unit.kv_head);
      return true;
    });
  }
  const bool finite = for_units(p, tiles, cuts, floats, [&](const AttentionUnit& unit, int64_t, float* scratch) {
    if (prepare && !shared) prepare(unit.batch, unit.kv_head);
    return kernels.forward(p, tiles, unit, scratch);
  });
  return finite || tiles.unseen.empty();
}

bool attention_backward_cpu(const AttentionCall& p, const AttentionGradients& g, const AttentionTiles& tiles) {
  const AttentionKernels& kernels = kernels_in_use();
  const int64_t cuts = cuts_for(p, tiles, kBackwardUnits, kTileRows), floats = kernels.scratch_floats(p, true);
  const int64_t sum_floats = 2 * p.keys * padded_dim(p.head_dim);
  bool finite;
  if (cuts == 1) {
    finite = for_units(p, tiles, 1, floats + sum_floats, [&](const AttentionUnit& unit, int64_t, float* scratch) {
      float* rest = scratch + sum_floats;
      const bool good = kernels.backward(p, g, tiles, unit, scratch, rest);  // first: reduce reads its sums
      return kernels.reduce(p, g, unit.batch, unit.kv_head, scratch, 1, rest) && good;
    });
  } else {
    const auto sums = make_scratch(p.batch * p.kv_heads * cuts * sum_floats);
    finite = for_units(p, tiles, cuts, floats, [&](const AttentionUnit& unit, int64_t number, float* scratch) {
      return kernels.backward(p, g, tiles, unit, sums.get() + number * sum_floats, scratch);
    });
    finite &= for_units(p, tiles, 1, floats, [&](const AttentionUnit& unit, int64_t number, float* scratch) {
      return kernels.reduce(p, g, unit.batch, unit.kv_head, sums.get() + number * cuts * sum_floats, cuts, scratch);
    });
  }
  return finite || tiles.unseen.empty();
}

}  // namespace ard
