// csrc/common/hopper.h for the host, after the PTX manual's definitions and stricter than the hardware:
//   barriers live in shared memory, are checked to be initialised and not overrun, and their phases end as on the chip;
//   a tensor copy spoils its destination when issued and lands later, each row swizzled by its shared-memory address; a
//   thread that wrote there before must have fenced;
//   a matrix instruction decodes its descriptors bit by bit. It takes a picture of its operands when issued, leaves NaN
//   in its accumulators, and does its work when a warp waits for it: operands that differ then from the picture, or
//   accumulators that were touched, are errors.
#pragma once

#include <array>
#include <cstring>
#include <limits>

namespace ard {

namespace emulator {

constexpr int kSharedBarrier = 4000;  // key of meetings: with the barrier's offset, who waits for it

struct SharedBarrier {  // the eight bytes in shared memory
  int32_t bytes;        // expected, less landed
  uint8_t pending, arrivals, parity, magic;
};
static_assert(sizeof(SharedBarrier) == 8);

struct Accumulator {
  int in_flight = 0;
  std::vector<float> value;
};

struct Wgmma {
  int columns;
  bool add;
  uint64_t a, b;  // descriptors; a: unless the words below are the operand
  const uint32_t* words[128];
  float* accumulator[128];
  std::vector<uint16_t> a_picture, b_picture;  // 64 x 16, 16 x columns
};

// One of the four warps of a warpgroup.
struct WarpWgmma {
  std::vector<std::shared_ptr<Wgmma>> open;
  std::deque<std::vector<std::shared_ptr<Wgmma>>> groups;
};

struct HopperState {
  int unfenced_barriers = 0;
  std::map<int, WarpWgmma> warps;
  std::map<int, bool> fenced;  // per thread: wgmma_fence since it last touched registers
  std::map<float*, Accumulator> accumulators;
  std::map<int, int> registers;  // per warpgroup, after setmaxnreg
};

inline HopperState& hopper() {
  if (!block->hopper) block->hopper = std::make_shared<HopperState>();
  return *static_cast<HopperState*>(block->hopper.get());
}

inline int chunk_swizzle(int swizzle) { return swizzle / 16 - 1; }

// Shared memory as the hardware addresses it; `memory()` is on a multiple of 1024.
inline int64_t swizzled_address(int64_t address, int swizzle) {
  return address ^ ((address >> 7 & chunk_swizzle(swizzle)) << 4);
}

}  // namespace emulator

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const char*>(shared) - emulator::block->memory());
}

inline int warp_uniform(int value) { return value; }
inline void fence_async_proxy() { emulator::block->self->stores.clear(); }

template <int kCount>
inline void pin_registers(float (&)[kCount]) {}

inline void hold_until(float value) {
  if (value < 0) emulator::block->fail("hold_until: a negative value");
}

// Barriers

inline emulator::SharedBarrier& barrier_state(uint64_t* barrier) {
  using namespace emulator;
  block->check_shared(barrier, 8, 8);
  auto& state = *reinterpret_cast<SharedBarrier*>(barrier);
  if (state.magic != 0xb5) block->fail("mbarrier: not initialised");
  return state;
}

inline void barrier_advance(uint64_t* barrier) {
  using namespace emulator;
  SharedBarrier& state = barrier_state(barrier);
  if (state.pending || state.bytes) return;
  state.parity ^= 1, state.pending = state.arrivals;
  const auto waiting = block->meetings.find({kSharedBarrier, static_cast<int>(shared_address(barrier))});
  if (waiting != block->meetings.end()) block->wake(waiting->second.waiting);
}

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  using namespace emulator;
  block->check_shared(barrier, 8, 8);
  const auto count = static_cast<uint8_t>(arrivals);
  *reinterpret_cast<SharedBarrier*>(barrier) = {0, count, count, 0, 0xb5};
  ++hopper().unfenced_barriers;
}

inline void mbarrier_fence_init() { emulator::hopper().unfenced_barriers = 0; }

inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  emulator::SharedBarrier& state = barrier_state(barrier);
  if (state.pending == 0) emulator::block->fail("mbarrier: more arrivals than expected in this phase");
  state.bytes += bytes;
  --state.pending;
  barrier_advance(barrier);
}

inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect(barrier, 0); }

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  using namespace emulator;
  while (barrier_state(barrier).parity == (parity & 1)) {
    block->meetings[{kSharedBarrier, static_cast<int>(shared_address(barrier))}].waiting.push_back(block->self);
    block->suspend("mbarrier_wait");
  }
}

// The copy engine

struct TensorMap {
  const char* base;
  TensorExtents extents;
  TensorBox box;
};

inline TensorMap make_tensor_map(const HeadsView& x, DType dtype, const TensorExtents& extents, const TensorBox& box) {
  const auto demand = [](bool holds, const char* what) {
    if (!holds) throw emulator::Failure(std::string("cuTensorMapEncodeTiled: ") + what);
  };
  demand(dtype != DType::kFloat32, "elements of two bytes");
  demand(reinterpret_cast<uintptr_t>(x.data) % 16 == 0, "the address is no multiple of 16");
  for (int i = 1; i < 4; ++i) {
    demand(extents.stride[i] % 16 == 0 && extents.stride[i] < uint64_t{1} << 40, "a stride is no multiple of 16");
    demand(extents.stride[i] > 0, "a stride is 0");
  }
  for (uint64_t size : extents.size) demand(size >= 1 && size <= uint64_t{1} << 32, "a size is out of bounds");
  demand(box.columns >= 1 && box.columns <= 256 && box.rows >= 1 && box.rows <= 256, "the box is out of bounds");
  demand(box.swizzle == 32 || box.swizzle == 64 || box.swizzle == 128, "no such swizzle");
  demand(box.columns * 2 == box.swizzle, "a row of the box must fill the span of the swizzle here");
  return {static_cast<const char*>(x.data), extents, box};
}

inline void tensor_prefetch(const TensorMap&) {}

inline void tensor_load(void* to, const TensorMap& map, uint64_t* barrier, int column, int token, int head, int batch) {
  using namespace emulator;
  const int row_bytes = map.box.columns * 2, bytes = map.box.rows * row_bytes;
  block->check_shared(to, bytes, 128);
  if (shared_address(to) % (8 * map.box.swizzle)) block->fail("tensor_load: destination inside of a swizzle's pattern");
  if (hopper().unfenced_barriers) block->fail("tensor_load: a barrier was initialised without a fence");
  block->check_fenced(to, bytes);
  barrier_state(barrier);
  std::memset(to, 0xff, bytes);
  ++counts.async_copies;
  Block* const here = block;
  block->in_flight.push_back([=, &map] {
    const int64_t start = shared_address(to);
    for (int row = 0; row < map.box.rows; ++row) {
      for (int i = 0; i < map.box.columns; ++i) {
        const int64_t at[4] = {column + i, token + row, head, batch};
        bool inside = true;
        int64_t offset = 0;
        for (int axis = 0; axis < 4; ++axis) {
          inside &= at[axis] >= 0 && at[axis] < static_cast<int64_t>(map.extents.size[axis]);
          offset += at[axis] * static_cast<int64_t>(map.extents.stride[axis]);
        }
        uint16_t element = 0;
        if (inside) std::memcpy(&element, map.base + offset, 2);
        std::memcpy(here->memory() + swizzled_address(start + row * row_bytes + 2 * i, map.box.swizzle), &element, 2);
      }
    }
    barrier_state(barrier).bytes -= bytes;
    barrier_advance(barrier);
  });
}

// Registers

inline void set_registers(const char* what, int count, int direction) {
  using namespace emulator;
  int none = 0;
  const int thread = thread_index(), before = 65536 / block_threads() / 8 * 8;
  if (count % 8 || count < 24 || count > 256) block->fail("setmaxnreg: no such count");
  if ((count - before) * direction < 0) block->fail("setmaxnreg: the other direction");
  hopper().registers[thread / 128] = count;
  meet({kWarpgroup, thread / 128}, 128, thread % 128, what, none, [](auto&) {});
  int all = 0;
  for (const auto& [group, registers] : hopper().registers) all += 128 * registers;
  if (all > 65536) block->fail("setmaxnreg: more registers than a multiprocessor has");
}

template <int kRegisters>
inline void raise_registers() {
  set_registers("raise_registers", kRegisters, 1);
}
template <int kRegisters>
inline void lower_registers() {
  set_registers("lower_registers", kRegisters, -1);
}

// Matrix instructions

namespace emulator {

// A matrix in shared memory as its descriptor says, after "Shared Memory Matrix Layout" and "Strides" of the manual.
// `outer` counts rows of A or columns of B, `k` the dimension that is summed over. In units of 16-byte chunks, with W
// of them in the swizzle's span (1 without swizzle):
//   K-major   ((8, m), 2)      : ((W, stride), 1), the second chunk at `leading` when W is 1
//   MN-major  ((W, m), (8, 2)) : ((1, leading), (W, stride)), without swizzle ((1, m), (8, 2)) : ((1, stride), (1,
//   leading))
inline uint16_t matrix_element(uint64_t descriptor, bool k_major, int outer, int k) {
  const auto field = [descriptor](int first) { return static_cast<int64_t>(descriptor >> first & 0x3fff) << 4; };
  const int64_t start = field(0), leading = field(16), stride = field(32);
  const int mode = static_cast<int>(descriptor >> 62), swizzle = mode == 0 ? 16 : 256 >> mode, width = swizzle / 2;
  if (descriptor >> 49 & 7) block->fail("wgmma: base offset of a matrix that starts on a pattern");
  if (descriptor & 0x3ff1c000c000c000) block->fail("wgmma: reserved bits of a descriptor are set");
  int64_t address = start;
  if (k_major) {
    address += outer % 8 * swizzle + outer / 8 * stride;
    address += mode == 0 ? k / 8 * leading + k % 8 * 2 : k * 2;
  } else {
    address += outer % width * 2 + k % 8 * swizzle;
    address += mode == 0 ? outer / 8 * stride + k / 8 * leading : outer / width * leading + k / 8 * stride;
  }
  const char* element = block->memory() + swizzled_address(address, swizzle);
  block->check_shared(element, 2, 2);
  uint16_t bits;
  std::memcpy(&bits, element, 2);
  return bits;
}

// Fragments of m64nNk16 ("Register fragments"): row and k of half `half` of word `word` of A; row and column of
// accumulator i.
inline int a_row(int thread, int word) { return thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8; }
inline int a_k(int thread, int word, int half) { return thread % 4 * 2 + word / 2 * 8 + half; }
inline int d_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + (i >> 1 & 1) * 8; }
inline int d_column(int thread, int i) { return (i >> 2) * 8 + thread % 4 * 2 + (i & 1); }

// The 16 rows of A that a warp works on, and all of B.
inline void picture_a(const Wgmma& op, bool in_registers, int warp, std::vector<uint16_t>& a) {
  a.resize(64 * 16);
  if (!in_registers) {
    for (int row = 16 * warp; row < 16 * warp + 16; ++row) {
      for (int k = 0; k < 16; ++k) a[row * 16 + k] = matrix_element(op.a, true, row, k);
    }
    return;
  }
  for (int thread = 32 * warp; thread < 32 * warp + 32; ++thread) {
    for (int word = 0; word < 4; ++word) {
      for (int half = 0; half < 2; ++half) {
        a[a_row(thread, word) * 16 + a_k(thread, word, half)] = op.words[thread][word] >> (16 * half) & 0xffff;
      }
    }
  }
}

inline void picture_b(const Wgmma& op, bool in_registers, std::vector<uint16_t>& b) {
  b.resize(16 * op.columns);
  for (int k = 0; k < 16; ++k) {
    for (int n = 0; n < op.columns; ++n) b[k * op.columns + n] = matrix_element(op.b, !in_registers, n, k);
  }
}

template <class T>
void run_wgmma(const Wgmma& op, int warp) {
  const bool in_registers = op.words[0] != nullptr;
  std::vector<uint16_t> a, b;
  picture_a(op, in_registers, warp, a), picture_b(op, in_registers, b);
  const auto same = [&](const auto& now, const auto& then, int first, int count) {
    return std::equal(now.begin() + first, now.begin() + first + count, then.begin() + first);
  };
  if (!same(a, op.a_picture, 256 * warp, 256)) block->fail("wgmma: A changed while in flight");
  if (!same(b, op.b_picture, 0, 16 * op.columns)) block->fail("wgmma: B changed while in flight");
  std::vector<float> wide(16 * op.columns), sum(16 * op.columns);
  for (size_t i = 0; i < wide.size(); ++i) wide[i] = widen(T{b[i]});
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float factor = widen(T{a[(16 * warp + row) * 16 + k]});
      for (int n = 0; n < op.columns; ++n) sum[row * op.columns + n] += factor * wide[k * op.columns + n];
    }
  }
  for (int thread = 32 * warp; thread < 32 * warp + 32; ++thread) {
    float* const registers = op.accumulator[thread];
    Accumulator& accumulator = hopper().accumulators[registers];
    for (int i = 0; i < op.columns / 2; ++i) {
      const float product = sum[(d_row(thread, i) - 16 * warp) * op.columns + d_column(thread, i)];
      accumulator.value[i] = (op.add ? accumulator.value[i] : 0) + product;
      if (!std::isnan(registers[i])) block->fail("wgmma: an accumulator was written while in flight");
    }
    if (--accumulator.in_flight == 0) std::copy(accumulator.value.begin(), accumulator.value.end(), registers);
  }
}

struct WgmmaCall {
  uint64_t a, b;
  const uint32_t* words;
  float* accumulator;
};

inline void issue_wgmma(const char* what, WgmmaCall mine, int columns, bool add) {
  const int thread = thread_index(), group = thread / 128;
  if (!hopper().fenced[thread]) block->fail("wgmma: no wgmma_fence since its registers were free to be touched");
  meet({kWarpgroup, group}, 128, thread % 128, what, mine, [&](std::vector<WgmmaCall*>& all) {
    auto op = std::make_shared<Wgmma>();
    op->columns = columns, op->add = add, op->a = all[0]->a, op->b = all[0]->b;
    for (int i = 0; i < 128; ++i) {
      if (all[i]->a != op->a || all[i]->b != op->b) block->fail("wgmma: descriptors differ within the warpgroup");
      op->words[i] = all[i]->words, op->accumulator[i] = all[i]->accumulator;
      Accumulator& accumulator = hopper().accumulators[all[i]->accumulator];
      float* const registers = all[i]->accumulator;
      if (accumulator.in_flight++ == 0) accumulator.value.assign(registers, registers + columns / 2);
      std::fill(registers, registers + columns / 2, std::numeric_limits<float>::quiet_NaN());
    }
    for (int warp = 0; warp < 4; ++warp) picture_a(*op, op->words[0] != nullptr, warp, op->a_picture);
    picture_b(*op, op->words[0] != nullptr, op->b_picture);
    for (int warp = 0; warp < 4; ++warp) hopper().warps[4 * group + warp].open.push_back(op);
    ++counts.mma;
  });
}

}  // namespace emulator

inline void wgmma_fence() { emulator::hopper().fenced[thread_index()] = true; }

inline void wgmma_commit() {  // as its first lane comes; the others come before the warp's next meeting
  if (thread_index() % 32) return;
  emulator::WarpWgmma& warp = emulator::hopper().warps[thread_index() / 32];
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
}

inline void (*run_wgmma_of_type)(const emulator::Wgmma&, int) = nullptr;  // one type per kernel

template <int kLeft>
inline void wgmma_wait() {
  using namespace emulator;
  int none = 0;
  hopper().fenced[thread_index()] = false;
  meet_warp("wgmma_wait", none, [](auto&) {
    const int warp = thread_index() / 32;
    auto& groups = hopper().warps[warp].groups;
    for (; groups.size() > kLeft; groups.pop_front()) {
      for (const auto& op : groups.front()) run_wgmma_of_type(*op, warp % 4);
    }
  });
}

template <class T, bool kAdd, int kCount>
inline void wgmma(float (&d)[kCount], uint64_t a, uint64_t b) {
  run_wgmma_of_type = &emulator::run_wgmma<T>;
  emulator::issue_wgmma("wgmma", {a, b, nullptr, d}, 2 * kCount, kAdd);
}

template <class T, int kCount>
inline void wgmma_rows(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b) {
  run_wgmma_of_type = &emulator::run_wgmma<T>;
  emulator::issue_wgmma("wgmma_rows", {0, b, a, d}, 2 * kCount, true);
}

}  // namespace ard
