#include "isa.h"

namespace ard {

namespace {

std::string& chosen() {
  static std::string name = supported_isas().front();
  return name;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> supported;
#if defined(ARD_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    supported.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) supported.push_back("avx2");
#endif
  supported.push_back("baseline");
  return supported;
}

const std::string& isa() { return chosen(); }

void use_isa(const std::string& name) {
  for (const std::string& supported : supported_isas())
    if (name == supported) {
      chosen() = name;
      return;
    }
  throw std::invalid_argument("use_cpu_isa: isa is '" + name + "'; expected one of cpu_isas()");
}

}  // namespace ard
