#include "sm80_forward.h"

template void ard::attention_forward_sm80<128>(const AttentionParams&, DType, void*);
template void ard::attention_history_sm80<128>(const AttentionParams&, DType, void*);
