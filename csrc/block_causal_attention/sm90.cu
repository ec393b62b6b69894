// Compiled once for each head dim of CMakeLists.txt.
#include "sm90.h"

template void ard::attention_forward_sm90<ARD_HEAD_DIM>(const AttentionParams&, DType, int, void*);
