// csrc/common/gpu.h for the host: a block's threads as coroutines on one core. It runs the very source of the GPU
// kernels and is stricter than a GPU, so that a kernel that passes here has no such mistake left:
//   shared memory starts as NaN, and a guard behind it must stay untouched;
//   an asynchronous copy spoils its destination when issued and lands only when it is waited for;
//   the warp with the highest priority runs as long as it can; priorities are drawn (`seed`), and drawn anew now and
//   then: so a missing barrier shows;
//   a meeting of a warp whose threads come to different operations is an error, and so is a deadlock;
//   misaligned 16-byte accesses and accesses past shared memory are errors; bank conflicts are counted.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define ARD_DEVICE inline
#define ARD_HOST_DEVICE inline
#define ARD_KERNEL(threads, blocks) inline void
#define ARD_GRID_CONSTANT

namespace ard {

using Stream = void*;

namespace emulator {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What the last launch did; reset by each. Conflicts are the passes over shared memory beyond the fewest possible.
struct Counts {
  int64_t shared_accesses = 0, bank_conflicts = 0, mma = 0, async_copies = 0;
};
inline Counts counts;
inline uint64_t seed = 0;  // 0: the first warps have priority throughout

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Access {
  uintptr_t address = 0;
  int bytes = 0;  // 0: this thread had none when others of its warp had one
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
  int thread = 0;
  const char* waits_for = "";
  std::unique_ptr<char[]> stack;
  std::vector<Copy> open;                // cp.async since the last commit
  std::deque<std::vector<Copy>> groups;  // committed, oldest first
  std::vector<Access> accesses;
  std::vector<Access> stores;  // to shared memory, since the last fence_async_proxy (Hopper kernels)
};

// A meeting of some threads: the last to come does the work, and all go on.
struct Meeting {
  int arrived = 0;
  const char* what = nullptr;
  std::vector<void*> operands;
  std::vector<Fiber*> waiting;
};

class Block {
 public:
  Block(int threads, size_t shared_bytes) : threads_(threads), shared_bytes_(shared_bytes) {
    memory_ = static_cast<char*>(std::aligned_alloc(1024, (shared_bytes + kGuard + 1023) / 1024 * 1024));
    fibers_.resize(threads);
    for (Fiber& fiber : fibers_) fiber.stack.reset(new char[kStack]);
    ready_.resize((threads + 31) / 32);
    random_.seed(seed);
  }
  ~Block() { std::free(memory_); }

  void run(int64_t x, int64_t y, int64_t grid, const std::function<void()>& kernel);

  int threads() const { return threads_; }
  char* memory() const { return memory_; }
  int64_t x = 0, y = 0, grid = 0;
  Fiber* self = nullptr;
  std::map<std::pair<int, int>, Meeting> meetings;  // (kind or barrier, group)
  // Bulk copies and the like that no thread is inside of.
  std::vector<std::function<void()>> in_flight;
  std::shared_ptr<void> hopper;  // what hopper_emulator.h remembers

  [[noreturn]] void fail(const std::string& what) const {
    throw Failure("block " + std::to_string(x) + ", thread " + std::to_string(self ? self->thread : -1) + ": " + what);
  }

  // No thread has written there since its last fence_async_proxy.
  void check_fenced(const void* address, size_t bytes) const {
    const auto first = reinterpret_cast<uintptr_t>(address);
    for (const Fiber& fiber : fibers_) {
      for (const Access& store : fiber.stores) {
        if (store.address < first + bytes && first < store.address + store.bytes) {
          fail("shared memory that thread " + std::to_string(fiber.thread) + " wrote without a fence_async_proxy");
        }
      }
    }
  }

  void suspend(const char* waits_for) {
    self->waits_for = waits_for;
    if (_setjmp(self->resume) == 0) _longjmp(scheduler_, 1);
  }

  void wake(std::vector<Fiber*>& waiting) {
    for (Fiber* fiber : waiting) ready_[fiber->thread / 32].push_back(fiber);
    waiting.clear();
  }

  // The accesses of a warp after a meeting are counted together again, whichever of its threads skipped some before.
  void align_accesses(int thread) {
    const auto first = fibers_.begin() + thread / 32 * 32, last = first + std::min(32, threads_ - thread / 32 * 32);
    size_t longest = 0;
    for (auto fiber = first; fiber != last; ++fiber) longest = std::max(longest, fiber->accesses.size());
    for (auto fiber = first; fiber != last; ++fiber) fiber->accesses.resize(longest);
  }

  void check_shared(const void* address, size_t bytes, size_t alignment) const {
    const auto at = static_cast<const char*>(address);
    if (at < memory_ || at + bytes > memory_ + shared_bytes_) fail("access outside of shared memory");
    if (reinterpret_cast<uintptr_t>(at) % alignment) fail("misaligned access to shared memory");
  }

  void count_access(const void* address, int bytes) {
    check_shared(address, bytes, bytes);
    self->accesses.push_back({reinterpret_cast<uintptr_t>(address), bytes});
  }

 private:
  static constexpr size_t kGuard = 4096, kStack = 192 << 10;

  static void enter(unsigned high, unsigned low) {
    reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low)->body();
  }

  void body() {
    try {
      (*kernel_)();
      if (!self->open.empty() || !self->groups.empty()) fail("leaves an asynchronous copy that it never waited for");
    } catch (const std::exception& error) {
      if (failure_.empty()) failure_ = error.what();
    }
    self->done = true;
    _longjmp(scheduler_, 1);
  }

  void resume(Fiber& fiber) {
    self = &fiber;
    if (_setjmp(scheduler_) == 0) {
      if (fiber.started) _longjmp(fiber.resume, 1);
      fiber.started = true;
      setcontext(&fiber.start);
    }
    self = nullptr;
  }

  // The next thread of the first warp that has one; null when none can run.
  Fiber* next() {
    if (seed && random_() % 512 == 0) std::shuffle(order_.begin(), order_.end(), random_);
    for (int warp : order_) {
      if (ready_[warp].empty()) continue;
      Fiber* fiber = ready_[warp].front();
      ready_[warp].pop_front();
      return fiber;
    }
    return nullptr;
  }

  void count_conflicts();

  int threads_;
  size_t shared_bytes_;
  char* memory_;
  std::vector<Fiber> fibers_;
  std::vector<std::deque<Fiber*>> ready_;  // per warp
  std::vector<int> order_;                 // of warps, the highest priority first
  jmp_buf scheduler_;
  std::mt19937_64 random_;
  const std::function<void()>* kernel_ = nullptr;
  std::string failure_;
};

inline Block* block = nullptr;

inline void Block::run(int64_t block_x, int64_t block_y, int64_t blocks, const std::function<void()>& kernel) {
  x = block_x, y = block_y, grid = blocks, kernel_ = &kernel;
  failure_.clear(), meetings.clear(), in_flight.clear(), hopper.reset();
  order_.clear();
  for (auto& queue : ready_) queue.clear(), order_.push_back(static_cast<int>(order_.size()));
  if (seed) std::shuffle(order_.begin(), order_.end(), random_);
  std::memset(memory_, 0xff, shared_bytes_ + kGuard);
  for (int i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.started = fiber.done = false, fiber.thread = i;
    fiber.open.clear(), fiber.groups.clear(), fiber.accesses.clear(), fiber.stores.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    const auto self_address = reinterpret_cast<uintptr_t>(this);
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self_address >> 32),
                static_cast<unsigned>(self_address));
    ready_[i / 32].push_back(&fiber);
  }
  while (failure_.empty()) {
    // Work in flight lands at a drawn moment, at the latest when no thread can run.
    Fiber* fiber = !in_flight.empty() && seed && random_() % 64 == 0 ? nullptr : next();
    if (fiber) {
      resume(*fiber);
    } else if (!in_flight.empty()) {
      const size_t i = seed ? random_() % in_flight.size() : 0;
      const auto land = in_flight[i];
      in_flight.erase(in_flight.begin() + static_cast<std::ptrdiff_t>(i));
      land();
    } else {
      break;
    }
  }
  if (failure_.empty()) {
    for (Fiber& fiber : fibers_) {
      self = &fiber;
      if (!fiber.done) fail(std::string("deadlock: waits for ") + fiber.waits_for);
    }
    self = nullptr;
    for (size_t i = 0; i < kGuard; ++i) {
      if (static_cast<unsigned char>(memory_[shared_bytes_ + i]) != 0xff) fail("wrote past shared memory");
    }
    count_conflicts();
  } else {
    throw Failure(failure_);
  }
}

// The k-th access of each thread of a warp counts as one instruction: kernels do not diverge around them.
inline void Block::count_conflicts() {
  for (int first = 0; first < threads_; first += 32) {
    const int lanes = std::min(32, threads_ - first);
    for (size_t k = 0;; ++k) {
      Access warp[32];
      int bytes = 0;
      bool last = true;
      for (int lane = 0; lane < lanes; ++lane) {
        const auto& own = fibers_[first + lane].accesses;
        if (k < own.size()) warp[lane] = own[k], bytes = std::max(bytes, own[k].bytes);
        last = last && k + 1 >= own.size();
      }
      if (last && bytes == 0) break;
      if (bytes == 0) continue;
      const int at_once = 128 / bytes;  // threads served by one pass
      for (int i = 0; i < lanes; i += at_once) {
        std::map<uintptr_t, std::vector<uintptr_t>> banks;  // bank -> distinct words
        size_t passes = 1;
        for (int j = i; j < std::min(lanes, i + at_once); ++j) {
          for (uintptr_t word = warp[j].address / 4; word < (warp[j].address + warp[j].bytes) / 4; ++word) {
            auto& words = banks[word % 32];
            if (std::find(words.begin(), words.end(), word) == words.end()) words.push_back(word);
            passes = std::max(passes, words.size());
          }
        }
        ++counts.shared_accesses;
        counts.bank_conflicts += static_cast<int64_t>(passes) - 1;
      }
    }
  }
}

// All `size` threads of a group meet; the last one calls complete(operands of all, in order of their position).
template <class Operands, class Complete>
void meet(std::pair<int, int> key, int size, int position, const char* what, Operands& operands, Complete complete) {
  Meeting& meeting = block->meetings[key];
  if (meeting.arrived == 0) meeting.what = what, meeting.operands.assign(size, nullptr);
  if (std::strcmp(meeting.what, what)) block->fail(std::string("comes to ") + what + ", its group to " + meeting.what);
  meeting.operands[position] = &operands;
  if (++meeting.arrived < size) {
    meeting.waiting.push_back(block->self);
    block->suspend(what);
    return;
  }
  std::vector<Operands*> all(size);
  for (int i = 0; i < size; ++i) all[i] = static_cast<Operands*>(meeting.operands[i]);
  complete(all);
  meeting.arrived = 0;
  block->wake(meeting.waiting);
}

constexpr int kWarp = 1000, kWarpgroup = 2000, kBlock = 3000;  // keys of meetings; barriers have their number

template <class Operands, class Complete>
void meet_warp(const char* what, Operands& operands, Complete complete) {
  const int thread = block->self->thread;
  const int size = std::min(32, block->threads() - thread / 32 * 32);
  meet({kWarp, thread / 32}, size, thread % 32, what, operands, [&](std::vector<Operands*>& all) {
    block->align_accesses(thread);
    complete(all);
  });
}

inline void land(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.from) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
}

}  // namespace emulator

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
