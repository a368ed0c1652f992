// The tests of no_master_test.cpp with the CUDA program, its GPU played by the host (cuda_on_host).
#include "no_master_test.cpp"
