// csrc/common/gpu.h for the host: a block's threads as coroutines on one core. It runs the very source of the GPU
// kernels and is stricter than a GPU, so that a kernel that passes here has no such mistake left:
//   shared memory starts as NaN, and a guard behind it must stay untouched;
//   an asynchronous copy spoils its destination when issued and lands only when it is waited for;
//   the warp with the highest priority runs as long as it can; priorities are drawn (`seed`), and drawn anew now and
//   then: so a missing barrier shows;
//   a meeting of a warp whose threads come to different operations is an error, and so is a deadlock;
//   misaligned 16-byte accesses and accesses past shared memory are errors; bank conflicts are counted.
#pragma once

#include <cmath>
#include <functional>

#include "block.h"

#define ARD_DEVICE inline
#define ARD_HOST_DEVICE inline
#define ARD_KERNEL(threads, blocks) inline void
#define ARD_GRID_CONSTANT

namespace ard {

using Stream = void*;

inline int thread_index() { return emulator::block->self->thread; }
inline int block_threads() { return emulator::block->threads(); }
inline int block_index() { return static_cast<int>(emulator::block->x); }
inline int block_index_y() { return static_cast<int>(emulator::block->y); }
inline int grid_blocks() { return static_cast<int>(emulator::block->grid); }
inline char* shared_memory() { return emulator::block->memory(); }

inline void sync_block() {
  int none = 0;
  const int thread = thread_index();
  emulator::meet({emulator::kBlock, 0}, block_threads(), thread, "sync_block", none, [](auto&) {
    for (int warp = 0; warp < block_threads(); warp += 32) emulator::block->align_accesses(warp);
  });
}

inline void sync_warp() {
  int none = 0;
  emulator::meet_warp("sync_warp", none, [](auto&) {});
}

inline void barrier_join(int id, int threads, bool wait) {
  using namespace emulator;
  Meeting& meeting = block->meetings[{id, 0}];
  if (id < 1 || id > 15 || threads % 32) block->fail("bar.sync: bad barrier or thread count");
  if (++meeting.arrived == threads) {
    meeting.arrived = 0;
    block->wake(meeting.waiting);
  } else if (wait) {
    meeting.waiting.push_back(block->self);
    block->suspend("bar.sync");
  }
}

inline void barrier_sync(int id, int threads) { barrier_join(id, threads, true); }
inline void barrier_arrive(int id, int threads) { barrier_join(id, threads, false); }

struct Exchange {
  float value;
  int from;
  float result;
};

inline float exchange(const char* what, float value, int from) {
  Exchange mine{value, from, 0};
  emulator::meet_warp(what, mine, [](std::vector<Exchange*>& all) {
    for (Exchange* each : all) each->result = all.at(each->from)->value;
  });
  return mine.result;
}

inline float shuffle_xor(float value, int lane_mask) {
  return exchange("shuffle_xor", value, thread_index() % 32 ^ lane_mask);
}
inline float shuffle(float value, int lane) { return exchange("shuffle", value, lane); }

inline int opaque(int value) { return value; }
inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float rsqrt(float x) { return 1 / std::sqrt(x); }
inline float maximum(float a, float b) { return std::fmax(a, b); }
constexpr int min_int(int a, int b) { return a < b ? a : b; }

struct alignas(16) Words {
  uint32_t word[4];
};

struct alignas(8) Words2 {
  uint32_t word[2];
};

inline void check_global(const void* address, size_t alignment = 16) {
  if (reinterpret_cast<uintptr_t>(address) % alignment) emulator::block->fail("misaligned access to global memory");
}

inline Words load_global(const void* from) {
  check_global(from);
  return *static_cast<const Words*>(from);
}
inline Words load_global_once(const void* from) { return load_global(from); }
inline void store_global(void* to, const Words& words) {
  check_global(to);
  *static_cast<Words*>(to) = words;
}

inline Words2 load_global2(const void* from) {
  check_global(from, 8);
  return *static_cast<const Words2*>(from);
}
inline void store_global(void* to, const Words2& words) {
  check_global(to, 8);
  *static_cast<Words2*>(to) = words;
}

template <class T>
inline T load_shared(const T* from) {
  emulator::block->count_access(from, sizeof(T));
  return *from;
}

template <class T>
inline void store_shared(T* to, const T& value) {
  emulator::block->count_access(to, sizeof(T));
  if (emulator::block->hopper) {
    emulator::block->self->stores.push_back({reinterpret_cast<uintptr_t>(to), static_cast<int>(sizeof(T))});
  }
  *to = value;
}

inline void cp_async_bytes(void* to, const void* from, bool here, size_t bytes) {
  using namespace emulator;
  block->check_shared(to, bytes, bytes);
  if (here && reinterpret_cast<uintptr_t>(from) % bytes) block->fail("cp.async: misaligned source");
  std::memset(to, 0xff, bytes);
  block->self->open.push_back({to, here ? from : nullptr, bytes});
  ++counts.async_copies;
}

inline void cp_async(void* to, const void* from, bool here) { cp_async_bytes(to, from, here, 16); }
inline void cp_async_8(void* to, const void* from, bool here) { cp_async_bytes(to, from, here, 8); }
inline void cp_async_4(void* to, const void* from, bool here) { cp_async_bytes(to, from, here, 4); }

inline void cp_async_commit() {
  emulator::Fiber& self = *emulator::block->self;
  self.groups.push_back(std::move(self.open));
  self.open.clear();
}

template <int kLeft>
inline void cp_async_wait() {
  auto& groups = emulator::block->self->groups;
  for (; groups.size() > kLeft; groups.pop_front()) emulator::land(groups.front());
}

struct MatrixLoad {
  const void* row;
  uint32_t* result;
};

inline void load_matrices(const char* what, uint32_t (&m)[4], const void* row, bool transposed) {
  using namespace emulator;
  block->check_shared(row, 16, 16);
  MatrixLoad mine{row, m};
  meet_warp(what, mine, [transposed](std::vector<MatrixLoad*>& all) {
    for (int i = 0; i < 4; ++i) {
      uint16_t matrix[8][8];
      int rows[8] = {}, passes = 1;  // rows that each group of 4 banks holds
      for (int r = 0; r < 8; ++r) {
        std::memcpy(matrix[r], all[8 * i + r]->row, 16);
        passes = std::max(passes, ++rows[reinterpret_cast<uintptr_t>(all[8 * i + r]->row) / 16 % 8]);
      }
      ++counts.shared_accesses;
      counts.bank_conflicts += passes - 1;
      for (int lane = 0; lane < 32; ++lane) {
        const int r = lane / 4, c = lane % 4 * 2;
        const uint32_t low = transposed ? matrix[c][r] : matrix[r][c];
        const uint32_t high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
        all[lane]->result[i] = low | high << 16;
      }
    }
  });
}

inline void ldmatrix(uint32_t (&m)[4], const void* row) { load_matrices("ldmatrix", m, row, false); }
inline void ldmatrix_transposed(uint32_t (&m)[4], const void* row) { load_matrices("ldmatrix.trans", m, row, true); }

template <class T>
inline float half_of(uint32_t word, int which) {
  return widen(T{static_cast<uint16_t>(word >> (16 * which))});
}

struct MmaOperands {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using namespace emulator;
  MmaOperands mine{d, a, {b0, b1}};
  meet_warp("mma", mine, [](std::vector<MmaOperands*>& all) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int i = 0; i < 2; ++i) {
        a[group][pair + i] = half_of<T>(all[lane]->a[0], i);
        a[group + 8][pair + i] = half_of<T>(all[lane]->a[1], i);
        a[group][pair + 8 + i] = half_of<T>(all[lane]->a[2], i);
        a[group + 8][pair + 8 + i] = half_of<T>(all[lane]->a[3], i);
        b[pair + i][group] = half_of<T>(all[lane]->b[0], i);
        b[pair + 8 + i][group] = half_of<T>(all[lane]->b[1], i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = all[lane]->d[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        all[lane]->d[i] = sum;
      }
    }
    ++counts.mma;
  });
}

struct MmaK8Operands {
  float* d;
  uint32_t a[2], b;
};

template <class T>
inline void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
  using namespace emulator;
  MmaK8Operands mine{d, {a0, a1}, b};
  meet_warp("mma_k8", mine, [](std::vector<MmaK8Operands*>& all) {
    float a[16][8], b[8][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 2; ++i) {
        a[lane / 4][lane % 4 * 2 + i] = half_of<T>(all[lane]->a[0], i);
        a[lane / 4 + 8][lane % 4 * 2 + i] = half_of<T>(all[lane]->a[1], i);
        b[lane % 4 * 2 + i][lane / 4] = half_of<T>(all[lane]->b, i);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 8; ++k) all[lane]->d[i] += a[row][k] * b[k][column];
      }
    }
    ++counts.mma;
  });
}

inline void bind_device() {}

template <auto kKernel, class Params>
void launch(int64_t blocks, int64_t blocks_y, int threads, size_t shared_bytes, Stream, const Params& params) {
  using namespace emulator;
  counts = Counts{};
  if (shared_bytes > (227 << 10)) throw Failure("launch: more shared memory than a block may have");
  Block here(threads, shared_bytes);
  block = &here;
  for (int64_t y = 0; y < blocks_y; ++y) {
    for (int64_t x = 0; x < blocks; ++x) here.run(x, y, blocks, [&params] { kKernel(params); });
  }
  block = nullptr;
}

}  // namespace ard
