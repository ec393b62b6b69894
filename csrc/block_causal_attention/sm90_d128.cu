#include "sm90.h"

template void ard::attention_forward_sm90<128>(const AttentionParams&, DType, int, void*);
