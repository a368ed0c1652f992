// Covering arrays of strength two: few rows such that any two axes take every pair of their values somewhere. A bug
// that needs two settings to meet then shows in dozens of cases instead of thousands. Greedy, after Cohen et al., "The
// AETG System", 1997: of some candidates, each grown from a pair that is still missing, the one with the most new
// pairs.
#pragma once

#include <algorithm>
#include <numeric>
#include <random>
#include <set>
#include <tuple>
#include <vector>

using AxisPair = std::tuple<size_t, int, size_t, int>;  // axis, its value, a later axis, its value

// Pairs that no row has. sizes[a] is the number of values of axis a.
inline std::set<AxisPair> missing_pairs(const std::vector<int>& sizes, const std::vector<std::vector<int>>& rows) {
    std::set<AxisPair> missing;
    for (size_t a = 0; a < sizes.size(); ++a)
        for (size_t b = a + 1; b < sizes.size(); ++b)
            for (int x = 0; x < sizes[a]; ++x)
                for (int y = 0; y < sizes[b]; ++y)
                    if (std::none_of(rows.begin(), rows.end(), [&](const auto& r) { return r[a] == x && r[b] == y; }))
                        missing.insert({a, x, b, y});
    return missing;
}

inline std::vector<std::vector<int>> covering_array(const std::vector<int>& sizes, unsigned seed) {
    constexpr int candidates = 20;
    std::mt19937 generator(seed);
    std::vector<std::vector<int>> rows;
    std::vector<size_t> axes(sizes.size());
    std::iota(axes.begin(), axes.end(), 0);
    for (std::set<AxisPair> missing = missing_pairs(sizes, rows); !missing.empty();) {
        std::vector<int> best;
        std::set<AxisPair> best_gain;
        for (int candidate = 0; candidate < candidates; ++candidate) {
            std::vector<int> row(sizes.size(), -1);  // -1: open
            std::set<AxisPair> gain;
            const auto set_axis = [&](size_t axis, int value) {
                row[axis] = value;
                for (size_t other = 0; other < row.size(); ++other) {
                    if (other == axis || row[other] < 0) continue;
                    const AxisPair pair = axis < other ? AxisPair{axis, value, other, row[other]}
                                                       : AxisPair{other, row[other], axis, value};
                    if (missing.count(pair)) gain.insert(pair);
                }
            };
            const auto& [a, x, b, y] = *std::next(missing.begin(), long(generator() % missing.size()));
            set_axis(a, x), set_axis(b, y);
            std::shuffle(axes.begin(), axes.end(), generator);
            for (size_t axis : axes) {
                if (row[axis] >= 0) continue;
                std::vector<int> values(static_cast<size_t>(sizes[axis]));
                std::iota(values.begin(), values.end(), 0);
                std::shuffle(values.begin(), values.end(), generator);
                const auto new_pairs = [&](int value) {
                    const auto before = gain;
                    set_axis(axis, value);
                    const size_t found = gain.size() - before.size();
                    gain = before;
                    return found;
                };
                set_axis(axis, *std::max_element(values.begin(), values.end(),
                                                 [&](int v, int w) { return new_pairs(v) < new_pairs(w); }));
            }
            if (gain.size() > best_gain.size()) best = row, best_gain = gain;
        }
        rows.push_back(best);
        for (const AxisPair& pair : best_gain) missing.erase(pair);
    }
    return rows;
}
