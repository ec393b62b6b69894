#include "sm80_backward.h"

template void ard::attention_backward_sm80<80>(const AttentionBackwardParams&, DType, void*);
template int ard::attention_shared_bytes_sm80<80>();
