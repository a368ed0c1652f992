// Recompute only what memory demands (InfiniPipe chooses so for each chunk). With recomputation without attention, the
// backward of pre and attention multiplies for queries, keys and values again (3C kept a token would spare it 6C^2
// multiplications), that of post for the projection and the first product of the MLP (5C would spare 10C^2). Every
// byte kept spares the same time, so a rank simply keeps what fits, in the order of its ops, while all that is alive at
// once stays within a limit. What a rank keeps is its own affair: messages are the same.
#pragma once

#include <limits>
#include <map>

#include "llmc/pipeline/plan.h"

// Sets Op::keeps in a rank's list so that its plan takes at most `limit` bytes of activations, if it does so already
// without keeping anything.
inline void keep_what_fits(std::vector<Op>& list, const std::vector<ChunkShape>& chunks, const GptConfig& g,
                           const TensorRules& rules, int64_t limit, TensorBytes bytes = tensor_bytes<BuildTypes>) {
    if (!rules.training || rules.recompute != Recompute::without_attention) return;
    if (rules.apart && !rules.helix.move_norm) return;  // post and the next pre are one block there

    struct Kept {
        int first = -1, last = -1;  // ops
    };
    std::map<std::tuple<bool, int, int>, Kept> parts;  // post or not, layer, chunk
    std::vector<std::tuple<bool, int, int>> order;
    const auto part_of = [](const Op& op) { return std::tuple(op.part == Part::post, op.layer, op.chunk); };
    const auto counts = [&](const Op& op) {
        return op.kind == Kind::compute && op.layer >= 0 && !(op.part == Part::post && rules.keeps_post(op.layer));
    };
    for (int i = 0; i < int(list.size()); ++i) {
        const Op& op = list[size_t(i)];
        if (!counts(op) || (rules.apart && op.part == Part::pre)) continue;  // that one keeps nothing
        const auto [place, is_new] = parts.try_emplace(part_of(op));
        if (is_new) place->second.first = i, order.push_back(place->first);
        place->second.last = i;
    }
    for (Op& op : list) op.keeps = false;
    constexpr int64_t any_arena = std::numeric_limits<int64_t>::max();  // only what is alive counts
    const std::vector<int64_t> plain = make_plan(list, chunks, g, rules, bytes, any_arena).live_bytes();
    // Gaps between tensors are known only once all are placed: what they take is given up again.
    for (int64_t target = limit; target > 0;) {
        std::vector<int64_t> live = plain;
        std::map<std::tuple<bool, int, int>, bool> keeps;
        for (const auto& part : order) {
            const auto& [post, layer, chunk] = part;
            const Kept kept = parts.at(part);
            const int64_t size =
                round_up(bytes(post ? Tensor::post_products : Tensor::qkv, chunks[size_t(chunk)], g), arena_alignment);
            const auto begin = live.begin() + kept.first, end = live.begin() + kept.last + 1;
            if (*std::max_element(begin, end) + size > target) continue;
            for (auto at = begin; at != end; ++at) *at += size;
            keeps[part] = true;
        }
        for (Op& op : list) op.keeps = counts(op) && keeps.count(part_of(op));
        const int64_t used = make_plan(list, chunks, g, rules, bytes, limit).size.bytes;
        if (used <= limit || keeps.empty()) return;
        target = std::min(target, *std::max_element(live.begin(), live.end())) - (used - limit);
    }
}
