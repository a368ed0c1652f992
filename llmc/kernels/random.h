// Counter-based random numbers: the value is a pure function of (seed, stream, index), so any rank can make any element
// of any tensor in any order. Stream names the use (a parameter, an epoch), index the element.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include "llmc/common.h"

// The finalizer of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64 bits in which each input bit flips every
// output bit with probability close to 1/2.
HOST_DEVICE inline uint64_t mix_bits(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

// The numbers of one stream, by index. Seed and stream are mixed once, so that a number takes one mixing more. The odd
// constant keeps (0, 0, 0) away from the fixed point 0.
class CounterStream {
public:
    CounterStream(uint64_t seed, uint64_t stream) : start_(mix_bits(mix_bits(seed + golden_) ^ (stream + golden_))) {}
    HOST_DEVICE uint64_t operator[](uint64_t index) const { return mix_bits(start_ + golden_ * (index + 1)); }

private:
    static constexpr uint64_t golden_ = 0x9e3779b97f4a7c15u;
    uint64_t start_;
};

inline uint64_t hash_counter(uint64_t seed, uint64_t stream, uint64_t index) {
    return CounterStream(seed, stream)[index];
}

// Uniform in [0, 1): the upper 53 bits, all a double holds.
inline double uniform(uint64_t seed, uint64_t stream, uint64_t index) {
    return double(hash_counter(seed, stream, index) >> 11) * 0x1p-53;
}

// Standard normal by Box-Muller: sqrt(-2 ln(1 - u)) cos(2 pi v), with 1 - u in (0, 1] so that the logarithm is finite.
inline float normal(uint64_t seed, uint64_t stream, uint64_t index) {
    const double u = uniform(seed, stream, 2 * index), v = uniform(seed, stream, 2 * index + 1);
    return float(std::sqrt(-2.0 * std::log(1.0 - u)) * std::cos(2.0 * std::numbers::pi * v));
}
