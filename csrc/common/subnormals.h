// Numbers below 2^-126. x86 adds and multiplies them a hundred times slower than others.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace ard {

// While one lives, its thread reads and writes 0 for them, whatever the caller's threads do. Elsewhere than on x86
// nothing happens.
class SubnormalsAreZero {
#if defined(__SSE2__)
 public:
  SubnormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushToZero | kDenormalsAreZero); }
  ~SubnormalsAreZero() { _mm_setcsr(before_); }
  SubnormalsAreZero(const SubnormalsAreZero&) = delete;
  SubnormalsAreZero& operator=(const SubnormalsAreZero&) = delete;

 private:
  static constexpr unsigned kFlushToZero = 1u << 15, kDenormalsAreZero = 1u << 6;
  unsigned before_;
#endif
};

}  // namespace ard
