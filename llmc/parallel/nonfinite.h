// Steps whose loss or gradients are not finite (README, "Exit codes"): what of them is not, and why the run ends there.
// Called by the training loop, by all ranks together.
#pragma once

#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "llmc/kernels/reduce.cuh"
#include "llmc/parallel/rank.h"

inline bool weights_are_finite(const Rank& rank) {
    double wrong = first_nonfinite(rank.device, rank.weights, flat_size(rank.parameters)) >= 0;
    rank.transport.sum({&wrong, 1});
    return wrong == 0;
}

// The weight that is not finite, or else the gradient nearest to the loss: the backward pass carries what went wrong
// from the head towards the embedding.
inline std::string name_nonfinite(const Rank& rank) {
    std::string found;  // "1 00017 weight h.1..." sorts after all that is less telling
    const auto look = [&](const auto* flat, int rating, const char* kind) {
        for (const Parameter& p : rank.parameters)
            if (const int64_t element = first_nonfinite(rank.device, flat + p.offset, p.size()); element >= 0)
                found = std::max(found, format("%d %05d ", rating, p.index) + kind + p.name + "[" +
                                            std::to_string(element / p.cols) + ", " + std::to_string(element % p.cols) +
                                            "]");
    };
    look(rank.gradients, 0, "gradient of ");
    look(rank.weights, 1, "weight ");
    const std::vector<std::string> all = rank.transport.all_gather(found);
    const std::string& name = *std::max_element(all.begin(), all.end());
    return name.empty() ? "loss" : name.substr(8);
}

// Computes the step once more, by replay(), which returns its loss: different bits mean that the hardware erred, equal
// bits that data or optimisation did.
template <class Replay>
[[noreturn]] void stop_at_nonfinite(Rank& rank, int64_t number, double loss, const Replay& replay) {
    const std::string where = name_nonfinite(rank);
    const auto hash_of_gradients = [&] {
        HostView<floatS> gradients(rank.device, rank.gradients, flat_size(rank.parameters), true);
        return XXH3_64bits(gradients.data(), size_t(gradients.size()) * sizeof(floatS));
    };
    const XXH64_hash_t first = hash_of_gradients();
    const double again = replay();
    const bool same = hash_of_gradients() == first && std::memcmp(&again, &loss, sizeof loss) == 0;
    const std::string what =
        "step " + std::to_string(number) + ": " + where + " is not finite (loss " + std::to_string(loss) + "). ";
    std::string differ;
    for (const std::string& name : rank.transport.all_gather(same ? "" : std::to_string(rank.index)))
        differ += (differ.empty() || name.empty() ? "" : ", ") + name;
    if (!differ.empty() && !repeats_bits(rank.options))
        throw JointFailure(EXIT_NONFINITE,
                           what +
                               "A replay gave different bits, as it may without --deterministic, so that data, "
                               "optimisation or hardware may be the cause: resume with --deterministic, which tells");
    if (differ.empty())
        throw JointFailure(EXIT_NONFINITE,
                           what +
                               "A replay gave the same bits, so data or optimisation are the cause: lower --lr, raise "
                               "--warmup, or pass such steps over with --on-nonfinite skip");
    throw JointFailure(EXIT_HARDWARE, what + "A replay gave different bits on rank " + differ +
                                          ", so the hardware is the cause: take this machine out and resume elsewhere");
}
