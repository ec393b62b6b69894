// Compiled once for each head dim of CMakeLists.txt.
#include "sm80_backward.h"

template void ard::attention_backward_sm80<ARD_HEAD_DIM>(const AttentionBackwardParams&, DType, void*);
template int ard::attention_shared_bytes_sm80<ARD_HEAD_DIM>();
