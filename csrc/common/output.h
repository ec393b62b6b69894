// Memory that a kernel on the CPU is about to write, and how that is best done.
#pragma once

#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#if !defined(MADV_POPULATE_WRITE)  // Linux 5.14; an older one refuses it, and each page comes by a fault
#define MADV_POPULATE_WRITE 23
#endif
#endif

namespace ard {

// An output this large is gone from the caches before anyone reads it, so it is written past them, which saves reading
// the lines first. Measured on Zen 5 with 32 MB of L3, 2 cores: see docs/performance.md.
constexpr int64_t kStreamBytes = 8 << 20;
// Smaller outputs are not worth the question whether they have pages, half a microsecond.
constexpr int64_t kAskedBytes = 1 << 20;
// Of less than a page at a time each would be asked for several times.
constexpr int64_t kClaimedBytes = 4096;

// Memory fresh from the system, as all that glibc hands out in blocks of 32 MB and more, has no pages yet. The system
// gives each at its first touch, cleared, and so in the caches: stores past them cost more there than they save. And
// each touch is a fault, which takes longer than all else that is done to a page.
class Output {
 public:
  Output() = default;
  Output(const void* data, int64_t bytes) : Output(data, bytes, bytes) {}
  // `own` of the bytes are written, with others between them.
  Output(const void* data, int64_t bytes, int64_t own)
      : fresh_(bytes >= kAskedBytes && lacks_page(data, bytes / 2)), streams_(own >= kStreamBytes && !fresh_) {}

  // Whether to write it past the caches.
  bool streams() const { return streams_; }

  // Has the system give the pages of fresh memory from `data` on at once: two thirds of the time of as many faults.
  // What is there stays. Best called for some dozen pages that this core is about to write, which are in its caches
  // then.
  void claim(const void* data, int64_t bytes) const {
    if (fresh_ && bytes >= kClaimedBytes) populate(data, bytes);
  }

 private:
  bool fresh_ = false, streams_ = false;

#if defined(__linux__)
  static uintptr_t page_of(uintptr_t address) {
    static const uintptr_t page_bytes = sysconf(_SC_PAGESIZE);
    return address - address % page_bytes;
  }

  // Of a block that has been used in part it is the end that is fresh. No answer is taken for a page.
  static bool lacks_page(const void* data, int64_t offset) {
    unsigned char resident = 1;
    const uintptr_t page = page_of(reinterpret_cast<uintptr_t>(data) + offset);
    return mincore(reinterpret_cast<void*>(page), 1, &resident) == 0 && !(resident & 1);
  }

  static void populate(const void* data, int64_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(data), page = page_of(begin);
    madvise(reinterpret_cast<void*>(page), begin + bytes - page, MADV_POPULATE_WRITE);
  }
#else
  static bool lacks_page(const void*, int64_t) { return false; }
  static void populate(const void*, int64_t) {}
#endif
};

}  // namespace ard
