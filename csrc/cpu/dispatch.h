// Which kernels this machine runs.
#pragma once

#include "kernels.h"

namespace convmixer_fast::cpu {

// The kernels of the newest ISA that the machine has, chosen at the first call.
//
// The environment variable CONVMIXER_FAST_CPU_ISA (the name of a row of the table) overrides the
// choice; it is there for tests. Throws std::invalid_argument where it names an unknown ISA or
// one that the machine lacks.
const Kernels& kernels();

}  // namespace convmixer_fast::cpu
