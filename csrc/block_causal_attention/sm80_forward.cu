// Compiled once for each head dim of CMakeLists.txt.
#include "sm80_forward.h"

template void ard::attention_forward_sm80<ARD_HEAD_DIM>(const AttentionParams&, DType, void*);
template void ard::attention_history_sm80<ARD_HEAD_DIM>(const AttentionParams&, DType, void*);
