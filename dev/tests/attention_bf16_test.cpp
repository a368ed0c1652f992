// The tests of attention_test.cpp with bf16 storage: AMX tiles, vdpbf16ps, and the widened forms.
#undef PRECISION_FP32
#define PRECISION_BF16
#include "attention_test.cpp"
