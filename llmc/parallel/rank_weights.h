// The weights of a rank in their two forms: floatX as kernels read them, floatS as checkpoints hold them. Called where
// weights come in or go out: at the start of a run, by checkpoints, by comparisons of layouts.
#pragma once

#include <type_traits>

#include "llmc/kernels/copy.cuh"
#include "llmc/parallel/checkpoint.h"
#include "llmc/parallel/rank.h"

// to = from + sign x center, for the parameters that are stored less a center; they are few, and this is rare.
template <class T, class U>
void shift_centered(Rank& rank, T* to, U* from, floatS sign) {
    for (const Parameter& p : rank.parameters) {
        if (p.center() == 0) continue;
        HostView<U> source(rank.device, from + p.offset, p.size(), true);
        HostView<T> target(rank.device, to + p.offset, p.size(), false);
        for (int64_t i = 0; i < p.size(); ++i) target.data()[i] = T(floatS(source.data()[i]) + sign * p.center());
        target.store();
    }
}

// Weights as kernels read them, from those in floatS: after initialisation and loading.
inline void round_weights(Rank& rank) {
    const int64_t n = flat_size(rank.parameters);
    if constexpr (std::is_same_v<floatX, floatS>) return;
    copy_rows(rank.device, Matrix<floatX>(rank.weights, 1, n), Matrix<const floatS>(rank.full_weights(), 1, n));
    shift_centered(rank, rank.weights, rank.full_weights(), -1);
}

// The other way, between steps: the weights in floatS.
inline floatS* widen_weights(Rank& rank) {
    const int64_t n = flat_size(rank.parameters);
    if (!rank.master) {
        copy_rows(rank.device, Matrix<floatS>(rank.full_weights(), 1, n), Matrix<const floatX>(rank.weights, 1, n));
        shift_centered(rank, rank.full_weights(), rank.weights, 1);
    }
    return rank.full_weights();
}

// What of a rank goes into a checkpoint, on the host.
struct CheckpointState {
    HostView<floatS> weights, m, v;
    CheckpointView view;

    CheckpointState(Rank& rank, bool read)
        : weights(rank.device, widen_weights(rank), flat_size(rank.parameters), read),
          m(rank.device, rank.m, flat_size(rank.parameters), read),
          v(rank.device, rank.v, flat_size(rank.parameters), read),
          view{rank.options.model, rank.parameters, weights.data(), m.data(), v.data()} {}
    void store() { weights.store(), m.store(), v.store(); }
};
