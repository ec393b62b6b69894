// Which instruction set the CPU kernels run. Rooms compile their row kernels once per ISA into a table whose first
// member is its name (`isa`), and pick the table of the ISA in use at each call.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

namespace ard {

// Those this CPU can run, best first; the one in use; and another choice, by name, for tests.
std::vector<std::string> supported_isas();
const std::string& isa();
void use_isa(const std::string& name);

template <class Kernels>
const Kernels& for_isa(std::initializer_list<const Kernels*> compiled) {
  for (const Kernels* kernels : compiled)
    if (isa() == kernels->isa) return *kernels;
  throw std::logic_error("no kernels were compiled for " + isa());
}

}  // namespace ard
