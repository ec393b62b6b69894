#include "sm90.h"

template void ard::attention_forward_sm90<64>(const AttentionParams&, DType, int, void*);
