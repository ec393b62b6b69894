// How the emulator runs a block: each thread a coroutine, meeting points, work in flight, shared memory that is
// watched.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <csetjmp>
#include <cstdint>
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

namespace ard::emulator {

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

}  // namespace ard::emulator
